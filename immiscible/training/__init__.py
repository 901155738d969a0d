"""The life of a run: loop, session, folder, checkpoints, log, cards."""
