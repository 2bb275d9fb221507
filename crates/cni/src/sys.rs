//! What has no safe wrapper: one system call, and the allocator of processes that live for a millisecond.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::UnsafeCell,
    io, mem,
    os::fd::AsRawFd,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

use rustix::net::{AddressFamily, SocketType};

/// Number of the calling thread's network namespace: never used twice within a boot.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    let mut cookie = 0u64;
    let mut len = mem::size_of::<u64>() as libc::socklen_t;
    // JUSTIFICATION: no safe crate in the tree offers SO_NETNS_COOKIE.
    // SAFETY: both pointers are to live locals, and `len` is the size of what the first points to.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if rc == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The most memory in kB that a child of this process had, of those that were waited for.
#[cfg(feature = "bench")]
pub fn children_kb_max() -> i64 {
    let mut usage = mem::MaybeUninit::<libc::rusage>::zeroed();
    // JUSTIFICATION: no safe crate in the tree offers getrusage.
    // SAFETY: the pointer is to a live local of the right type, for which all bits zero are a value.
    unsafe {
        libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        usage.assume_init().ru_maxrss
    }
}

/// Bytes of [`Arena`]; untouched ones cost nothing. An ADD with 250 reservations needs about half of it.
const ARENA_BYTES: usize = 1 << 20;

/// Hands out one static block from its beginning to its end, and memory of the system once that is used up. Only the newest
/// piece can be given back or grown in place. A process that answers once and ends needs no more, while the allocator of
/// the C library maps and unmaps pages at every turn, which was a tenth of an ADD.
pub struct Arena {
    block: UnsafeCell<[u8; ARENA_BYTES]>,
    used: AtomicUsize,
}

// JUSTIFICATION: a global allocator is shared by all threads.
// SAFETY: no two callers get the same bytes, since `used` only moves by compare-and-exchange.
unsafe impl Sync for Arena {}

impl Arena {
    #[expect(clippy::new_without_default, reason = "it is the initial value of a static")]
    pub const fn new() -> Self {
        Self {
            block: UnsafeCell::new([0; ARENA_BYTES]),
            used: AtomicUsize::new(0),
        }
    }

    fn start(&self) -> usize {
        self.block.get() as usize
    }

    /// Moves the end from `from` to `to` if it is still at `from`.
    fn move_end(&self, from: usize, to: usize) -> bool {
        to <= ARENA_BYTES
            && self
                .used
                .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Offset of `at` if it lies in the block.
    fn offset(&self, at: *mut u8) -> Option<usize> {
        (at as usize).checked_sub(self.start()).filter(|o| *o < ARENA_BYTES)
    }
}

// JUSTIFICATION: there is no other way to choose an allocator.
// SAFETY: pieces are disjoint parts of the block, aligned as asked, and not handed out again before they were given back;
// what is not in the block is the system allocator's from its beginning to its end.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        loop {
            let used = self.used.load(Ordering::Relaxed);
            let Some(begin) = (self.start() + used).checked_next_multiple_of(layout.align()) else {
                break;
            };
            let begin = begin - self.start();
            let Some(end) = begin.checked_add(layout.size()).filter(|end| *end <= ARENA_BYTES) else {
                break;
            };
            if self.move_end(used, end) {
                // SAFETY: `begin` is within the block.
                return unsafe { self.block.get().cast::<u8>().add(begin) };
            }
        }
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        match self.offset(at) {
            Some(begin) => {
                self.move_end(begin + layout.size(), begin);
            }
            // SAFETY: it came from the system allocator with this layout.
            None => unsafe { System.dealloc(at, layout) },
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(begin) = self.offset(at) else {
            // SAFETY: it came from the system allocator with this layout.
            return unsafe { System.realloc(at, layout, size) };
        };
        let in_place = size <= layout.size()
            || begin
                .checked_add(size)
                .is_some_and(|end| self.move_end(begin + layout.size(), end));
        if in_place {
            return at;
        }
        // SAFETY: the caller promises that `size` with this alignment is a layout, and the new piece is larger than the old.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                ptr::copy_nonoverlapping(at, new, layout.size());
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_aligned_and_grow_in_place_while_they_are_the_newest() {
        static ARENA: Arena = Arena::new();
        let layout = |size, align| Layout::from_size_align(size, align).unwrap();
        // SAFETY: every piece is used within its size and given back with the layout it was asked for.
        unsafe {
            let (a, b) = (ARENA.alloc(layout(3, 1)), ARENA.alloc(layout(64, 64)));
            assert!((b as usize).is_multiple_of(64) && b as usize >= a as usize + 3);
            b.write_bytes(7, 64);
            let grown = ARENA.realloc(b, layout(64, 64), 128);
            assert_eq!(grown, b, "the newest grows in place");
            let c = ARENA.alloc(layout(8, 8));
            let moved = ARENA.realloc(b, layout(128, 64), 256);
            assert!(moved != b && *moved == 7 && *moved.add(63) == 7);
            ARENA.dealloc(moved, layout(256, 64));
            assert_eq!(ARENA.alloc(layout(256, 64)), moved, "the newest is given back");
            let large = layout(2 * ARENA_BYTES, 16);
            let far = ARENA.alloc(large);
            assert!(!far.is_null() && ARENA.offset(far).is_none());
            far.add(large.size() - 1).write(1);
            ARENA.dealloc(far, large);
            let all = layout(ARENA_BYTES / 2, 1);
            let (first, second) = (ARENA.alloc(all), ARENA.alloc(all));
            assert!(ARENA.offset(first).is_some() && ARENA.offset(second).is_none());
            let second = ARENA.realloc(second, all, ARENA_BYTES);
            second.add(ARENA_BYTES - 1).write(1);
            ARENA.dealloc(second, layout(ARENA_BYTES, 1));
            ARENA.dealloc(c, layout(8, 8));
        }
        let threads: Vec<_> = (0..4)
            .map(|n: u8| {
                std::thread::spawn(move || {
                    // SAFETY: as above.
                    let mine: Vec<*mut u8> = (0..100).map(|_| unsafe { ARENA.alloc(layout(40, 8)) }).collect();
                    for p in &mine {
                        // SAFETY: as above.
                        unsafe { p.write_bytes(n, 40) };
                    }
                    // SAFETY: as above.
                    mine.iter().all(|p| (0..40).all(|i| unsafe { *p.add(i) } == n))
                })
            })
            .collect();
        assert!(
            threads.into_iter().all(|t| t.join().unwrap()),
            "nobody wrote into another's piece"
        );
    }
}
