"""Systems that change widths or share factors; baselines in memory, without a checkpoint format."""
