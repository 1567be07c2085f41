"""Graphs: capturing, reading, editing and copying them; nothing here knows of attention."""
