"""How it is said: verbalisation, the only place that builds strings, and the token trie."""
