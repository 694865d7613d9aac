//! Tools for `.hrl` files of anyone.
