//! TUN devices: links whose other end is a file of this process, one IP packet per read and write.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use crate::netns::NetNs;

mod sys;

/// Opens the TUN device `name` of `ns`, making it if it is not there; reads and writes do not block. The device outlives the
/// file, so that its routes stay while nobody serves it (packets are dropped meanwhile). The caller brings it up.
///
/// # Errors
/// `EBUSY` if another process serves it.
pub fn open(ns: &NetNs, name: &str) -> io::Result<OwnedFd> {
    ns.run(|| {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
        let file = rustix::fs::open("/dev/net/tun", flags, rustix::fs::Mode::empty())?;
        sys::attach(file.as_raw_fd(), name)?;
        Ok(file)
    })
    .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{netlink::Route, netns};

    #[test]
    fn a_device_stays_in_its_namespace_without_its_file() {
        let host = || {
            netns::become_private_host(&[Path::new("/run")]).unwrap();
            let ns = netns::create_named(Path::new("/run/n/v")).unwrap();
            let mut inside = Route::open_in(&ns).unwrap();
            let file = open(&ns, "t0").unwrap();
            assert_eq!(open(&ns, "t0").unwrap_err().raw_os_error(), Some(libc::EBUSY));
            drop(file);
            assert!(inside.link("t0").unwrap().is_some());
            assert!(Route::open().unwrap().link("t0").unwrap().is_none());
            open(&ns, "t0").unwrap();
            assert!(open(&ns, "a name that is far too long").is_err());
        };
        std::thread::spawn(host).join().unwrap();
    }
}
