"""BuPO for real language models: transformers loads and shards them, TRL trains them."""
