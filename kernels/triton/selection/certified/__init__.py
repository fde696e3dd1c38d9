"""A selection whose ids are certified from int8 scores, and are those of the 16-bit kernel (see `launch`)."""
