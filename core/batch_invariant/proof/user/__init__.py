"""`verify` for functions of users: variations of their batch, and where a row first parts."""
