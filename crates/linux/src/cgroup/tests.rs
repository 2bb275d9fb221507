use super::*;

const HYBRID_MOUNTS: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
const HYBRID_OWN: &str = "8:pids:/\n4:memory:/a/b\n2:cpuacct:/\n1:cpu:/\n0::/\n";

#[test]
fn a_hybrid_host_without_unified_controllers_uses_version_1() {
    let found = Hierarchy::from_tables(HYBRID_MOUNTS, HYBRID_OWN, &|_| "hugetlb".to_owned()).unwrap();
    assert_eq!(found.version(), Version::V1);
    let dirs = found.group("x/y").unwrap().directories();
    assert!(
        dirs.contains(&PathBuf::from("/sys/fs/cgroup/memory/a/b/x/y")),
        "{dirs:?}"
    );
    assert!(dirs.contains(&PathBuf::from("/sys/fs/cgroup/cpu/x/y")), "{dirs:?}");
}

#[test]
fn unified_controllers_win_and_the_leaf_is_not_nested() {
    let mounts = "30 1 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let found = Hierarchy::from_tables(mounts, "0::/slice/oaks-self\n", &|_| {
        "cpuset cpu io memory pids".to_owned()
    })
    .unwrap();
    assert_eq!(found.version(), Version::V2);
    assert_eq!(
        found.group("p").unwrap().directories(),
        [PathBuf::from("/sys/fs/cgroup/slice/p")]
    );
}

#[test]
fn a_mount_of_a_subtree_is_relative_to_it() {
    let mounts = "30 1 0:28 /node /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let all = &|_: &Path| "cpu memory pids".to_owned();
    let found = Hierarchy::from_tables(mounts, "0::/node/agent\n", all).unwrap();
    assert_eq!(
        found.group("p").unwrap().directories(),
        [PathBuf::from("/sys/fs/cgroup/agent/p")]
    );
    assert!(matches!(
        Hierarchy::from_tables("", "", all),
        Err(CgroupError::NoHierarchy)
    ));
}

#[test]
fn paths_that_leave_the_own_group_are_refused() {
    let found = Hierarchy::from_tables(HYBRID_MOUNTS, HYBRID_OWN, &|_| String::new()).unwrap();
    for path in ["", "/abs", "a/../b", ".."] {
        assert!(matches!(found.group(path), Err(CgroupError::BadPath { .. })), "{path}");
    }
}

#[test]
fn weights_follow_shares() {
    assert_eq!((shares(0), shares(1000), shares(u32::MAX.into())), (2, 1024, 262_144));
    assert_eq!((weight(0), weight(1000), weight(u32::MAX.into())), (1, 39, 10_000));
}

/// Kernel test in a group of its own; skipped by nothing: every host that can run containers can run it.
#[test]
fn limits_processes_and_removal_in_the_kernel() {
    let hierarchy = Hierarchy::detect().unwrap();
    let group = hierarchy.group(format!("oaks-test-{}", std::process::id())).unwrap();
    let inner = group.child("inner").unwrap();
    inner.create().unwrap();
    inner.create().unwrap();
    let limits = Limits {
        cpu_milli: Some(500),
        cpu_weight_milli: Some(100),
        memory_bytes: Some(64 << 20),
        pids: Some(50),
    };
    inner.set_limits(&limits).unwrap();
    let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    inner.add(child.id()).unwrap();
    assert_eq!(group.processes().unwrap(), [child.id()]);
    assert_eq!(inner.usage().unwrap().pids, 1);
    assert_eq!(inner.oom_kills().unwrap(), 0);
    let reaper = std::thread::spawn(move || child.wait());
    assert!(group.kill_all(std::time::Duration::from_secs(5)).unwrap());
    reaper.join().unwrap().unwrap();
    group.remove().unwrap();
    group.remove().unwrap();
    assert!(!inner.exists());
}
