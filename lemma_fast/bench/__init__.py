"""`lemma-fast bench`: how fast the network is here, in each of its forms."""
