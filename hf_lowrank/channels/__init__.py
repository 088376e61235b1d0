"""Channels of feed-forwards: finding them, what losing some costs, and the layers without them."""
