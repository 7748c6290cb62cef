"""From logits: log-probs, and objectives in one launch."""
