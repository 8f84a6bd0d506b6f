"""What a job tells about itself: events, and the pages and figures made of them."""
