"""How ranks talk: small agreements, the clique's exchange of shards, and retrieval at a restart."""
