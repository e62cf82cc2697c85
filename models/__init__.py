"""The GPT: embedding, blocks, attention, rotary positions, norms. Its training is in models/training/."""
