//! The one mount call that `rustix` has no safe form of.

use std::{ffi::CString, io, os::unix::ffi::OsStrExt, path::Path};

/// `mount_setattr(AT_FDCWD, path, AT_RECURSIVE, { attr_set: MOUNT_ATTR_RDONLY })`.
pub(super) fn set_readonly_recursive(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: `path` is a NUL-terminated string and `attr` a structure of the size we pass; both outlive the call, which
    // keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
