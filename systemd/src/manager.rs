//! The service manager, as a process that it started sees it.
