"""Who holds theta: resident tensors or ZeRO-3 shards, behind one protocol."""
