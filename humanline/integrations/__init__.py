"""One small file a trainer: humanline in trainers people already run."""
