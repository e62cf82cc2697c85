"""The GPT and its training: attention, blocks, model, Lightning module, callbacks, run folders."""
