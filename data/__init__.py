"""Byte corpora, and the LightningDataModule that cuts windows from them; README.md lists what is here."""
