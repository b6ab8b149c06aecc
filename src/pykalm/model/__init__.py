"""Who reads it: any Hugging Face causal LM, adapters, the encoder, the entity index, the run folder."""
