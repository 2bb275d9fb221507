//! Programs of the distribution that tests compare with or chain, unpacked beside the build and not installed.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

/// Downloads the packages with apt (three tries) and unpacks them; returns the root of what they hold. A set that was
/// unpacked before is used again.
///
/// # Panics
/// If a package cannot be had: a test that needs it must fail, not pass without it.
pub fn unpack(packages: &[&str]) -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/debian");
    let dir = tools.join(packages.join("+"));
    fs::create_dir_all(&dir).expect("the folder for tools can be made");
    let dir = dir.canonicalize().expect("it was made just now");
    let (root, done) = (dir.join("root"), dir.join("done"));
    // Test processes run at the same time; the lock ends with the process.
    let lock = File::create(dir.join("lock")).expect("a lock file can be made");
    lock.lock().expect("the lock can be had");
    if done.is_file() {
        return root;
    }
    let mut tries = 0;
    while let Err(e) = download(&dir, packages) {
        tries += 1;
        assert!(tries < 3, "apt-get download {packages:?}: {e}");
        let _ = run(&dir, "apt-get", &["update", "-qq"]);
        thread::sleep(Duration::from_secs(1 << tries));
    }
    let files = fs::read_dir(&dir).expect("the folder can be read");
    for file in files.filter_map(Result::ok).map(|f| f.path()) {
        if file.extension().is_some_and(|e| e == "deb") {
            run(&dir, "dpkg", &["-x", &file.to_string_lossy(), &root.to_string_lossy()]).expect("dpkg unpacks");
        }
    }
    File::create(done).expect("a stamp can be made");
    root
}

fn download(dir: &Path, packages: &[&str]) -> io::Result<()> {
    let mut args = vec!["download", "-qq"];
    args.extend(packages);
    run(dir, "apt-get", &args)
}

fn run(dir: &Path, program: &str, args: &[&str]) -> io::Result<()> {
    let out = Command::new(program).args(args).current_dir(dir).output()?;
    if out.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("{program} {args:?}: {}: {text}", out.status)))
}

/// `iptables` of the distribution with the libraries it came with.
pub struct Iptables {
    /// For `PATH`.
    pub bin: PathBuf,
    /// For `LD_LIBRARY_PATH`.
    pub lib: PathBuf,
    /// For `XTABLES_LIBDIR`.
    pub extensions: PathBuf,
}

/// # Panics
/// As [`unpack`].
pub fn iptables() -> Iptables {
    let packages = [
        "iptables",
        "libxtables12",
        "libip4tc2",
        "libip6tc2",
        "libmnl0",
        "libnftnl11",
    ];
    let root = unpack(&[&packages[..], &["libnetfilter-conntrack3", "libnfnetlink0"]].concat());
    let bin = root.join("usr/sbin");
    for name in ["iptables", "ip6tables"] {
        // What the package's set-up would do.
        let link = bin.join(name);
        if !link.exists() {
            let _ = std::os::unix::fs::symlink("xtables-nft-multi", link);
        }
    }
    let lib = fs::read_dir(root.join("usr/lib"))
        .expect("the package has libraries")
        .filter_map(Result::ok)
        .map(|e| e.path())
        .find(|p| p.join("xtables").is_dir())
        .expect("the package has extensions");
    Iptables {
        bin,
        extensions: lib.join("xtables"),
        lib,
    }
}
