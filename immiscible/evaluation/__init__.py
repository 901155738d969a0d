"""Pictures become numbers: feature networks, distances, validation loss, leakage."""
