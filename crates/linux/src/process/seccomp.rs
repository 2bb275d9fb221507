//! The default system call filter for containers, assembled here: no C library is needed.
//!
//! It is a deny list in the spirit of the runtimes' default profile: what needs host-wide power or has a record of kernel
//! escapes answers EPERM, and `clone3` answers ENOSYS so that C libraries fall back to `clone`, whose flags can be read.
//! A container that was given the capability behind a call keeps the call, as upstream's profile does.

use std::collections::BTreeSet;

use thiserror::Error;

use super::sys;

#[derive(Debug, Error)]
pub enum SeccompError {
    #[error("install the system call filter")]
    Install(#[source] std::io::Error),
}

/// Capability that gives a group of calls back, by its name without `CAP_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unless {
    Never,
    Has(&'static str),
}

use Unless::{Has, Never};

/// Calls refused with EPERM, and the capability that lifts the refusal.
const DENIED: &[(libc::c_long, Unless)] = &[
    (libc::SYS_acct, Has("SYS_PACCT")),
    (libc::SYS_add_key, Never),
    (libc::SYS_request_key, Never),
    (libc::SYS_keyctl, Never),
    (libc::SYS_bpf, Has("SYS_ADMIN")),
    (libc::SYS_clock_settime, Has("SYS_TIME")),
    (libc::SYS_clock_adjtime, Has("SYS_TIME")),
    (libc::SYS_settimeofday, Has("SYS_TIME")),
    (libc::SYS_adjtimex, Has("SYS_TIME")),
    (libc::SYS_delete_module, Has("SYS_MODULE")),
    (libc::SYS_init_module, Has("SYS_MODULE")),
    (libc::SYS_finit_module, Has("SYS_MODULE")),
    (libc::SYS_fanotify_init, Has("SYS_ADMIN")),
    (libc::SYS_fsconfig, Has("SYS_ADMIN")),
    (libc::SYS_fsmount, Has("SYS_ADMIN")),
    (libc::SYS_fsopen, Has("SYS_ADMIN")),
    (libc::SYS_fspick, Has("SYS_ADMIN")),
    (libc::SYS_io_uring_setup, Never),
    (libc::SYS_io_uring_enter, Never),
    (libc::SYS_io_uring_register, Never),
    (libc::SYS_kexec_file_load, Has("SYS_BOOT")),
    (libc::SYS_kexec_load, Has("SYS_BOOT")),
    (libc::SYS_lookup_dcookie, Has("SYS_ADMIN")),
    (libc::SYS_mount, Has("SYS_ADMIN")),
    (libc::SYS_mount_setattr, Has("SYS_ADMIN")),
    (libc::SYS_move_mount, Has("SYS_ADMIN")),
    (libc::SYS_move_pages, Has("SYS_NICE")),
    (libc::SYS_nfsservctl, Never),
    (libc::SYS_open_by_handle_at, Has("DAC_READ_SEARCH")),
    (libc::SYS_open_tree, Has("SYS_ADMIN")),
    (libc::SYS_perf_event_open, Has("PERFMON")),
    (libc::SYS_pivot_root, Has("SYS_ADMIN")),
    (libc::SYS_process_vm_readv, Has("SYS_PTRACE")),
    (libc::SYS_process_vm_writev, Has("SYS_PTRACE")),
    (libc::SYS_quotactl, Has("SYS_ADMIN")),
    (libc::SYS_reboot, Has("SYS_BOOT")),
    (libc::SYS_setdomainname, Has("SYS_ADMIN")),
    (libc::SYS_sethostname, Has("SYS_ADMIN")),
    (libc::SYS_setns, Has("SYS_ADMIN")),
    (libc::SYS_swapoff, Never),
    (libc::SYS_swapon, Never),
    (libc::SYS_syslog, Has("SYSLOG")),
    (libc::SYS_umount2, Has("SYS_ADMIN")),
    (libc::SYS_unshare, Has("SYS_ADMIN")),
    (libc::SYS_userfaultfd, Never),
    (libc::SYS_vhangup, Has("SYS_TTY_CONFIG")),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_ioperm, Has("SYS_RAWIO")),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_iopl, Has("SYS_RAWIO")),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_uselib, Never),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS__sysctl, Never),
];

/// Namespace flags that `clone` may not carry without CAP_SYS_ADMIN.
const CLONE_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xC000_00B7;

/// Offsets in `struct seccomp_data`.
const NR: u32 = 0;
const ARCH_FIELD: u32 = 4;
const ARG0_LOW: u32 = 16;

/// Builds the default filter for a container that keeps `capabilities` (names without `CAP_`).
pub fn default_filter(capabilities: &BTreeSet<String>) -> Vec<libc::sock_filter> {
    let allow = stmt(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW);
    let errno = |code: i32| {
        stmt(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | (code as u32 & 0xffff),
        )
    };
    let load = |offset| stmt(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    let admin = capabilities.contains("SYS_ADMIN");

    let mut program = vec![load(ARCH_FIELD)];
    // Calls of another architecture (32-bit programs on a 64-bit kernel) have other numbers: refuse them all.
    program.extend([
        jump(libc::BPF_JEQ, ARCH, 1, 0),
        stmt(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
        ),
    ]);
    program.push(load(NR));
    // The x32 numbering of x86_64 would walk around the list.
    if cfg!(target_arch = "x86_64") {
        program.extend([jump(libc::BPF_JGE, 0x4000_0000, 0, 1), errno(libc::ENOSYS)]);
    }
    for (number, unless) in DENIED {
        if matches!(unless, Has(name) if capabilities.contains(*name)) {
            continue;
        }
        program.extend([jump(libc::BPF_JEQ, *number as u32, 0, 1), errno(libc::EPERM)]);
    }
    if !admin {
        program.extend([jump(libc::BPF_JEQ, libc::SYS_clone3 as u32, 0, 1), errno(libc::ENOSYS)]);
        program.extend([
            jump(libc::BPF_JEQ, libc::SYS_clone as u32, 0, 3),
            load(ARG0_LOW),
            jump(libc::BPF_JSET, CLONE_NAMESPACES, 0, 1),
            errno(libc::EPERM),
        ]);
    }
    program.push(allow);
    program
}

/// Installs the default filter for the calling thread and what it starts.
/// Needs CAP_SYS_ADMIN in effect or no-new-privileges set.
pub fn install_default(capabilities: &BTreeSet<String>) -> Result<(), SeccompError> {
    sys::install_filter(&default_filter(capabilities)).map_err(SeccompError::Install)
}

fn stmt(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: (libc::BPF_JMP | test | libc::BPF_K) as u16,
        jt,
        jf,
        k,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel would, for one call.
    fn verdict(program: &[libc::sock_filter], nr: i64, arg0: u32) -> u32 {
        let (mut at, mut acc) = (0, 0);
        loop {
            let op = program[at];
            at += 1;
            match u32::from(op.code) & 7 {
                libc::BPF_LD => {
                    acc = match op.k {
                        NR => nr as u32,
                        ARCH_FIELD => ARCH,
                        ARG0_LOW => arg0,
                        _ => unreachable!(),
                    }
                }
                libc::BPF_JMP => {
                    let holds = match u32::from(op.code) & 0xf0 {
                        libc::BPF_JEQ => acc == op.k,
                        libc::BPF_JGE => acc >= op.k,
                        libc::BPF_JSET => acc & op.k != 0,
                        _ => unreachable!(),
                    };
                    at += usize::from(if holds { op.jt } else { op.jf });
                }
                _ => return op.k,
            }
        }
    }

    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    #[test]
    fn the_default_filter_refuses_what_reaches_the_host() {
        let plain = default_filter(&BTreeSet::new());
        for nr in [
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_kexec_load,
            libc::SYS_keyctl,
            libc::SYS_setns,
            libc::SYS_reboot,
        ] {
            assert_eq!(verdict(&plain, nr, 0), EPERM, "{nr}");
        }
        for nr in [
            libc::SYS_read,
            libc::SYS_execve,
            libc::SYS_socket,
            libc::SYS_capset,
            libc::SYS_prctl,
        ] {
            assert_eq!(verdict(&plain, nr, 0), libc::SECCOMP_RET_ALLOW, "{nr}");
        }
        assert_eq!(verdict(&plain, libc::SYS_clone3, 0), ENOSYS);
        assert_eq!(verdict(&plain, libc::SYS_clone, libc::CLONE_NEWUSER as u32), EPERM);
        assert_eq!(
            verdict(&plain, libc::SYS_clone, (libc::CLONE_VM | libc::CLONE_THREAD) as u32),
            libc::SECCOMP_RET_ALLOW
        );
        #[cfg(target_arch = "x86_64")]
        assert_eq!(verdict(&plain, 0x4000_0000 + libc::SYS_mount, 0), ENOSYS);
    }

    #[test]
    fn a_granted_capability_gives_its_calls_back() {
        let admin = default_filter(&BTreeSet::from(["SYS_ADMIN".to_owned()]));
        assert_eq!(verdict(&admin, libc::SYS_mount, 0), libc::SECCOMP_RET_ALLOW);
        assert_eq!(
            verdict(&admin, libc::SYS_clone, libc::CLONE_NEWUSER as u32),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(&admin, libc::SYS_keyctl, 0), EPERM);
        assert!(admin.len() < 4096);
    }
}
