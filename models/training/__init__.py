"""Training a GPT: what a step is, optimizer, callbacks, checkpoints, loggers, run folders, reports."""
