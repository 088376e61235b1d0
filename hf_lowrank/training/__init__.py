"""Low-rank training: ranks chosen by the loss while the model trains, and recovery after a cut."""
