"""A Llama whose feed-forward weights are block-sparse."""
