"""What coordinator and workers share: types, limits, plans and the wire between them."""
