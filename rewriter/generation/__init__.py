"""Generation: new tokens over a cache in which keys live as long as their ranges."""
