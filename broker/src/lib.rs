//! What of the broker can be looked at from outside: how the bytes of a client become a request. Everything else is the
//! program.
#![forbid(unsafe_code)]

pub mod call;
