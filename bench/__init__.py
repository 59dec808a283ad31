"""How fast, measured: each file answers one question with a ratio to a peer or a bound."""
