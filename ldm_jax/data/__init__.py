"""Pictures and captions: random-access sources, and the one pipeline that makes batches of them."""
