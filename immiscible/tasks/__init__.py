"""What can be trained, a room each."""
