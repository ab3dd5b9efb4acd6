"""From logits to token ids, for one sequence or several."""
