"""From documents to token blocks: reading a corpus, tokenising and packing it, reading it by position."""
