"""The GPT: embedding, blocks, attention, positions, norms. Its training is in models/training/."""
