//! Pure placement, and the loop that binds.
