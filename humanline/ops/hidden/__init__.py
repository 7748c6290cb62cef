"""From hidden states and the output head: log-probs and objectives that never hold all logits."""
