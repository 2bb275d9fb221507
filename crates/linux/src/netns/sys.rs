//! The one call that the safe interface of rustix marks as unsafe.

use rustix::io::Result;
use rustix::thread::UnshareFlags;

/// Gives the calling thread a fresh network namespace.
pub fn unshare_network() -> Result<()> {
    // JUSTIFICATION: rustix offers `unshare` only as an unsafe function because of CLONE_FILES.
    // SAFETY: CLONE_NEWNET shares no file table and touches no memory of this process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Gives the calling thread fresh network and mount namespaces.
pub fn unshare_network_and_mounts() -> Result<()> {
    // JUSTIFICATION: as above.
    // SAFETY: CLONE_NEWNS implies CLONE_FS, which only separates this thread's working directory from the others'.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }
}
