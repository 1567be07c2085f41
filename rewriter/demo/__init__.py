"""The demo: a small trained model, the text it is tried on, and the table."""
