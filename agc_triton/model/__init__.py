"""Parameter groups for a model: units by layer, no decay, the head left unclipped."""
