"""How good pictures are: encoders, scores, and what may be concluded from them."""
