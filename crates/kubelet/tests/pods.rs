//! Pods from creation to removal over fakes of both edges, with paused time.

use std::{fs, path::Path, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use kubelet::{
    Kubelet,
    fake::{FakeApi, FakeRuntime, config},
};
use serde_json::{Value, json};
use stdx::Shutdown;
use tempfile::TempDir;
use tokio::{
    task::JoinHandle,
    time::{Instant, advance, sleep},
};

struct World {
    api: Arc<FakeApi>,
    runtime: Arc<FakeRuntime>,
    dir: TempDir,
    stop: Shutdown,
    agent: Option<JoinHandle<()>>,
}

impl World {
    fn new() -> Self {
        Self {
            api: Arc::default(),
            runtime: Arc::default(),
            dir: tempfile::tempdir().unwrap(),
            stop: Shutdown::new(),
            agent: None,
        }
    }

    fn start(&mut self) {
        self.start_with(|_| {});
    }

    fn start_with(&mut self, change: impl FnOnce(&mut kubelet::KubeletConfig)) {
        let mut c = config(&self.api, &self.runtime, self.dir.path());
        change(&mut c);
        self.stop = Shutdown::new();
        let (k, stop) = (Kubelet::new(c).unwrap(), self.stop.clone());
        self.agent = Some(tokio::spawn(async move { k.run(stop).await }));
    }

    async fn stop(&mut self) {
        self.stop.trigger();
        self.agent.take().unwrap().await.unwrap();
    }

    fn volume(&self, uid: &str, name: &str) -> std::path::PathBuf {
        self.dir
            .path()
            .join("kubelet/pods")
            .join(uid)
            .join("volumes")
            .join(name)
    }
}

fn one(image: &str) -> Value {
    json!({"containers": [{"name": "c", "image": image}]})
}

fn running(s: &PodStatus) -> bool {
    s.phase.as_deref() == Some("Running")
}

fn ready(s: &PodStatus) -> bool {
    condition(s, "Ready") == "True"
}

fn condition<'a>(s: &'a PodStatus, type_: &str) -> &'a str {
    s.conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == type_)
        .map_or("", |c| c.status.as_str())
}

fn container<'a>(s: &'a PodStatus, name: &str) -> &'a ContainerStatus {
    let all = s.container_statuses.iter().chain(&s.init_container_statuses).flatten();
    all.into_iter().find(|c| c.name == name).unwrap()
}

fn waiting(s: &PodStatus, name: &str) -> String {
    let c = s
        .container_statuses
        .iter()
        .chain(&s.init_container_statuses)
        .flatten()
        .find(|c| c.name == name);
    c.and_then(|c| c.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .unwrap_or_default()
}

async fn until(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !check() {
        assert!(Instant::now() < deadline, "not {what}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn reaches_running_and_is_deleted_gracefully() {
    let mut w = World::new();
    w.start();
    let pod = w.api.create_pod("p", one("nginx"), json!({}));
    let begun = Instant::now();
    let s = w.api.until("p", "ready", ready).await;
    assert!(begun.elapsed() < Duration::from_millis(20), "{:?}", begun.elapsed());
    assert!(running(&s));
    assert_eq!(s.pod_ip.as_deref(), Some("127.0.0.1"));
    assert_eq!(s.host_ip.as_deref(), Some("10.1.0.4"));
    assert_eq!(s.qos_class.as_deref(), Some("BestEffort"));
    assert_eq!(s.observed_generation, Some(1));
    for t in [
        "PodReadyToStartContainers",
        "Initialized",
        "Ready",
        "ContainersReady",
        "PodScheduled",
    ] {
        assert_eq!(condition(&s, t), "True", "{t}");
    }
    assert!(
        container(&s, "c")
            .container_id
            .as_ref()
            .unwrap()
            .starts_with("oaks://c")
    );
    let reasons: Vec<String> = w.api.events("p").into_iter().map(|e| e.0).collect();
    assert_eq!(reasons, ["Pulling", "Pulled", "Created", "Started"]);
    let made = w.runtime.made("c").unwrap();
    let env = |n: &str| made.env.iter().find(|(k, _)| k == n).map(|(_, v)| v.clone());
    assert_eq!(env("KUBERNETES_SERVICE_HOST").as_deref(), Some("10.0.0.1"));
    assert!(made.mounts.iter().any(|m| m.container_path == Path::new("/etc/hosts")));

    w.runtime.stubborn(true);
    w.api.remove_pod("p", 5);
    let begun = Instant::now();
    until("deleted", || !w.api.exists("p")).await;
    assert!(begun.elapsed() >= Duration::from_secs(5) && begun.elapsed() < Duration::from_secs(6));
    let last = w.api.last_status("p").unwrap();
    assert_eq!(
        container(&last, "c")
            .state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        137
    );
    assert!(
        w.runtime.calls().contains(&"stop c 5".to_owned()),
        "{:?}",
        w.runtime.calls()
    );
    assert_eq!((w.runtime.sandboxes(), w.runtime.containers()), (0, 0));
    assert!(!w.volume(pod.metadata.uid.as_ref().unwrap(), "").exists());
    assert_eq!(w.api.phases("p").last().unwrap(), "Failed");
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn registers_and_keeps_its_lease() {
    let mut w = World::new();
    w.start_with(|c| {
        c.taints = vec!["virtual-kubelet.io/provider=azure:NoSchedule".into()];
        c.labels.insert("agentpool".into(), "np1".into());
    });
    until("leased", || w.api.lease_now().is_some()).await;
    let node = w.api.node_now().unwrap();
    let labels = node.metadata.labels.unwrap();
    assert_eq!(labels["kubernetes.io/hostname"], "n1");
    assert_eq!(labels["agentpool"], "np1");
    assert_eq!(labels["node.kubernetes.io/instance-type"], "Standard_D2s_v3");
    let taint = &node.spec.unwrap().taints.unwrap()[0];
    assert_eq!(
        (taint.key.as_str(), taint.value.as_deref(), taint.effect.as_str()),
        ("virtual-kubelet.io/provider", Some("azure"), "NoSchedule")
    );
    let status = node.status.unwrap();
    assert_eq!(status.node_info.unwrap().kubelet_version, "v1.36.4");
    assert!(
        status
            .conditions
            .unwrap()
            .iter()
            .any(|c| c.type_ == "Ready" && c.status == "True")
    );
    assert_eq!(status.capacity.unwrap()["cpu"].0, "4");
    let first = w.api.lease_now().unwrap().spec.unwrap().renew_time.unwrap();
    advance(Duration::from_secs(11)).await;
    until("renewed", || {
        w.api.lease_now().unwrap().spec.unwrap().renew_time.unwrap() > first
    })
    .await;
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn init_containers_run_in_order() {
    let mut w = World::new();
    w.start();
    w.api.create_pod(
        "p",
        json!({
            "initContainers": [
                {"name": "one", "image": "exit:0"},
                {"name": "side", "image": "proxy", "restartPolicy": "Always"},
                {"name": "two", "image": "slow"},
            ],
            "containers": [{"name": "c", "image": "nginx"}],
        }),
        json!({}),
    );
    let s = w
        .api
        .until("p", "in its second init container", |s| {
            s.init_container_statuses
                .as_ref()
                .is_some_and(|i| i.len() == 3 && i[2].state.as_ref().is_some_and(|s| s.running.is_some()))
        })
        .await;
    assert_eq!(s.phase.as_deref(), Some("Pending"));
    assert_eq!(waiting(&s, "c"), "PodInitializing");
    assert_eq!(condition(&s, "Initialized"), "False");
    w.runtime.finish("two", 0);
    w.api.until("p", "ready", ready).await;
    let starts: Vec<String> = w
        .runtime
        .calls()
        .into_iter()
        .filter(|c| c.starts_with("start"))
        .collect();
    assert_eq!(starts, ["start one", "start side", "start two", "start c"]);
    // The sidecar goes last.
    w.api.remove_pod("p", 30);
    until("deleted", || !w.api.exists("p")).await;
    let stops: Vec<String> = w
        .runtime
        .calls()
        .into_iter()
        .filter(|c| c.starts_with("stop"))
        .map(|c| c.split(' ').nth(1).unwrap().to_owned())
        .collect();
    assert_eq!(stops, ["c", "side"]);
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_init_container_fails_a_pod_that_never_restarts() {
    let mut w = World::new();
    w.start();
    let mut spec = one("nginx");
    spec["restartPolicy"] = json!("Never");
    spec["initContainers"] = json!([{"name": "bad", "image": "exit:3"}]);
    w.api.create_pod("p", spec, json!({}));
    let s = w
        .api
        .until("p", "failed", |s| s.phase.as_deref() == Some("Failed"))
        .await;
    assert_eq!(
        container(&s, "bad")
            .state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        3
    );
    assert!(!w.runtime.calls().contains(&"start c".to_owned()));
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn restarts_with_backoff() {
    let mut w = World::new();
    w.start();
    w.api.create_pod("p", one("nginx"), json!({}));
    w.api.until("p", "ready", ready).await;
    // The first restart is immediate, the next ones wait 10 s and 20 s.
    w.runtime.finish("c", 1);
    w.api
        .until("p", "restarted", |s| container(s, "c").restart_count == 1 && ready(s))
        .await;
    for (n, wait) in [(2, 10), (3, 20)] {
        let begun = Instant::now();
        w.runtime.finish("c", 1);
        let s = w
            .api
            .until("p", "backing off", |s| waiting(s, "c") == "CrashLoopBackOff")
            .await;
        assert!(running(&s));
        assert_eq!(
            container(&s, "c")
                .last_state
                .as_ref()
                .unwrap()
                .terminated
                .as_ref()
                .unwrap()
                .exit_code,
            1
        );
        w.api
            .until("p", "restarted", |s| container(s, "c").restart_count == n && ready(s))
            .await;
        let took = begun.elapsed();
        assert!(
            took >= Duration::from_secs(wait) && took < Duration::from_secs(wait + 1),
            "restart {n}: {took:?}"
        );
    }
    assert!(w.api.events("p").iter().any(|e| e.0 == "BackOff"));
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn jobs_end() {
    let mut w = World::new();
    w.start();
    for (name, image, policy, phase) in [
        ("good", "exit:0", "OnFailure", "Succeeded"),
        ("bad", "exit:7", "Never", "Failed"),
    ] {
        let mut spec = one(image);
        spec["restartPolicy"] = json!(policy);
        w.api.create_pod(name, spec, json!({}));
        let s = w.api.until(name, phase, |s| s.phase.as_deref() == Some(phase)).await;
        assert_eq!(condition(&s, "Ready"), "False");
        assert_eq!(w.api.phases(name).last().unwrap(), phase);
    }
    // A pod that is over gives its network back and is still there to be read.
    let mut spec = one("nginx");
    spec["activeDeadlineSeconds"] = json!(5);
    w.api.create_pod("late", spec, json!({}));
    let s = w
        .api
        .until("late", "failed", |s| s.phase.as_deref() == Some("Failed"))
        .await;
    assert_eq!(s.reason.as_deref(), Some("DeadlineExceeded"));
    assert!(w.api.exists("late"));
    w.api.remove_pod("late", 30);
    until("deleted", || !w.api.exists("late")).await;
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn configmaps_reach_running_pods() {
    let mut w = World::new();
    w.start();
    w.api.put_map("m", json!({"a": "1", "b": "x"}));
    w.api.put_secret("s", &[("password", "geheim")]);
    let pod = w.api.create_pod(
        "p",
        json!({
            "serviceAccountName": "sa",
            "containers": [{"name": "c", "image": "nginx",
                "env": [
                    {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "a"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "ALL", "value": "$(A)-$(IP)"},
                    {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "nix", "key": "k", "optional": true}}},
                ],
                "envFrom": [{"secretRef": {"name": "s"}, "prefix": "S_"}],
                "command": ["run", "$(ALL)"],
                "volumeMounts": [
                    {"name": "m", "mountPath": "/m"}, {"name": "data", "mountPath": "/d", "subPath": "x/y"},
                    {"name": "all", "mountPath": "/all"},
                ]}],
            "volumes": [
                {"name": "m", "configMap": {"name": "m", "items": [{"key": "a", "path": "dir/a", "mode": 256}]}},
                {"name": "data", "emptyDir": {}},
                {"name": "all", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
                    {"configMap": {"name": "m"}},
                    {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
                ]}},
            ],
        }),
        json!({"labels": {"app": "x"}}),
    );
    w.api.until("p", "ready", ready).await;
    let uid = pod.metadata.uid.clone().unwrap();
    let made = w.runtime.made("c").unwrap();
    let env = |n: &str| made.env.iter().find(|(k, _)| k == n).map(|(_, v)| v.as_str());
    assert_eq!(
        (env("ALL"), env("S_password"), env("NONE")),
        (Some("1-127.0.0.1"), Some("geheim"), None)
    );
    assert_eq!(made.command, ["run", "1-127.0.0.1"]);
    let m = made
        .mounts
        .iter()
        .find(|m| m.container_path == Path::new("/m"))
        .unwrap();
    assert!(m.readonly);
    assert_eq!(fs::read_to_string(m.host_path.join("dir/a")).unwrap(), "1");
    assert!(w.volume(&uid, "data").join("x/y").is_dir());
    let all = w.volume(&uid, "all");
    assert_eq!(fs::read_to_string(all.join("token")).unwrap(), "token-1");
    assert_eq!(fs::read_to_string(all.join("labels")).unwrap(), "app=\"x\"");

    w.api.put_map("m", json!({"a": "2", "b": "x"}));
    until("refreshed", || {
        fs::read_to_string(all.join("a")).is_ok_and(|v| v == "2")
    })
    .await;
    assert_eq!(fs::read_to_string(w.volume(&uid, "m").join("dir/a")).unwrap(), "2");
    assert_eq!(fs::read_to_string(all.join("token")).unwrap(), "token-1");
    // Labels are followed at once, tokens renewed at four fifths of their life.
    w.api
        .change_pod("p", |p| p.metadata.labels = Some([("app".into(), "y".into())].into()));
    until("labels", || {
        fs::read_to_string(all.join("labels")).is_ok_and(|v| v == "app=\"y\"")
    })
    .await;
    for _ in 0..30 {
        advance(Duration::from_secs(20)).await;
        sleep(Duration::from_millis(5)).await;
    }
    until("token renewed", || {
        fs::read_to_string(all.join("token")).is_ok_and(|v| v != "token-1")
    })
    .await;
    assert!(w.api.tokens() <= 3, "{}", w.api.tokens());
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn missing_references_wait_and_say_so() {
    let mut w = World::new();
    w.start();
    let mut spec = one("nginx");
    spec["containers"][0]["env"] = json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "a"}}}]);
    w.api.create_pod("env", spec, json!({}));
    let mut spec = one("nginx");
    spec["volumes"] = json!([{"name": "v", "secret": {"secretName": "s"}}]);
    w.api.create_pod("vol", spec, json!({}));
    w.api.create_pod("img", one("missing:1"), json!({}));
    let s = w
        .api
        .until("env", "waiting", |s| waiting(s, "c") == "CreateContainerConfigError")
        .await;
    let message = container(&s, "c")
        .state
        .as_ref()
        .unwrap()
        .waiting
        .as_ref()
        .unwrap()
        .message
        .clone()
        .unwrap();
    assert_eq!(message, "configmap \"m\" not found");
    until("FailedMount", || {
        w.api
            .events("vol")
            .iter()
            .any(|e| e.0 == "FailedMount" && e.1.contains("secret \"s\" not found"))
    })
    .await;
    w.api
        .until("img", "not pulled", |s| waiting(s, "c") == "ErrImagePull")
        .await;
    w.api
        .until("img", "backing off", |s| waiting(s, "c") == "ImagePullBackOff")
        .await;
    w.api.put_map("m", json!({"a": "1"}));
    w.api.put_secret("s", &[("k", "v")]);
    w.api.until("env", "ready", ready).await;
    w.api.until("vol", "ready", ready).await;
    // Deleting what never ran is quick.
    let begun = Instant::now();
    w.api.remove_pod("img", 30);
    until("deleted", || !w.api.exists("img")).await;
    assert!(begun.elapsed() < Duration::from_secs(1));
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn unsupported_fields_are_named() {
    let mut w = World::new();
    w.start();
    let mut spec = one("nginx");
    spec["hostPID"] = json!(true);
    w.api.create_pod("p", spec, json!({}));
    let mut spec = one("nginx");
    spec["volumes"] = json!([{"name": "v", "nfs": {"server": "s", "path": "/"}}]);
    w.api.create_pod("v", spec, json!({}));
    let mut spec = one("nginx");
    spec["containers"][0]["resources"] = json!({"requests": {"cpu": "100"}});
    w.api.create_pod("big", spec, json!({}));
    let s = w.api.until("p", "refused", |s| waiting(s, "c") == "Unsupported").await;
    assert!(
        container(&s, "c")
            .state
            .as_ref()
            .unwrap()
            .waiting
            .as_ref()
            .unwrap()
            .message
            .as_ref()
            .unwrap()
            .starts_with("spec.hostPID: ")
    );
    w.api.until("v", "refused", |s| waiting(s, "c") == "FailedMount").await;
    until("an event", || {
        w.api
            .events("v")
            .iter()
            .any(|e| e.0 == "FailedMount" && e.1.contains("spec.volumes[0].nfs"))
    })
    .await;
    let s = w
        .api
        .until("big", "failed", |s| s.phase.as_deref() == Some("Failed"))
        .await;
    assert_eq!(s.reason.as_deref(), Some("OutOfcpu"));
    assert_eq!(w.runtime.sandboxes(), 0);
    w.api.remove_pod("p", 30);
    until("deleted", || !w.api.exists("p")).await;
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn probes_decide() {
    let mut w = World::new();
    w.start();
    w.runtime.exec_answers("ready", 1);
    w.runtime.exec_answers("live", 0);
    let mut spec = one("nginx");
    spec["containers"][0]["readinessProbe"] = json!({"exec": {"command": ["ready"]}, "periodSeconds": 2});
    spec["containers"][0]["livenessProbe"] =
        json!({"exec": {"command": ["live"]}, "periodSeconds": 1, "failureThreshold": 2});
    w.api.create_pod("p", spec, json!({}));
    let s = w.api.until("p", "running", running).await;
    assert!(!ready(&s));
    until("unhealthy", || {
        w.api
            .events("p")
            .iter()
            .any(|e| e.0 == "Unhealthy" && e.1.starts_with("Readiness"))
    })
    .await;
    w.runtime.exec_answers("ready", 0);
    w.api.until("p", "ready", ready).await;
    w.runtime.exec_answers("live", 1);
    w.api
        .until("p", "restarted", |s| container(s, "c").restart_count == 1)
        .await;
    assert!(
        w.api
            .events("p")
            .iter()
            .any(|e| e.0 == "Killing" && e.1.contains("failed liveness probe"))
    );
    w.stop().await;
}

#[tokio::test]
async fn an_http_probe_sees_the_first_answer() {
    let mut w = World::new();
    w.start();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut spec = one("nginx");
    spec["containers"][0]["readinessProbe"] = json!({"httpGet": {"path": "/", "port": port}, "periodSeconds": 10});
    w.api.create_pod("p", spec, json!({}));
    w.api.until("p", "running", running).await;
    // Nobody has answered so far; the second connection gets its answer long before the next period.
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        for n in 0.. {
            let (mut s, _) = listener.accept().await.unwrap();
            let mut b = [0; 512];
            let _ = s.read(&mut b).await;
            let code = if n == 0 { "500 Oh" } else { "200 OK" };
            let _ = s
                .write_all(format!("HTTP/1.1 {code}\r\nContent-Length: 0\r\n\r\n").as_bytes())
                .await;
        }
    });
    let begun = Instant::now();
    w.api.until("p", "ready", ready).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn hooks_run_around_a_container() {
    let mut w = World::new();
    w.start();
    let mut spec = one("nginx");
    spec["containers"][0]["lifecycle"] =
        json!({"postStart": {"exec": {"command": ["hello"]}}, "preStop": {"exec": {"command": ["bye"]}}});
    w.api.create_pod("p", spec, json!({}));
    w.api.until("p", "ready", ready).await;
    w.api.remove_pod("p", 30);
    until("deleted", || !w.api.exists("p")).await;
    let calls: Vec<String> = w
        .runtime
        .calls()
        .into_iter()
        .filter(|c| !c.starts_with("pull") && !c.starts_with("sandbox"))
        .collect();
    assert_eq!(
        calls,
        ["create c", "start c", "exec c hello", "exec c bye", "stop c 30"]
    );
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_agent_adopts_and_reaps() {
    let mut w = World::new();
    w.start();
    w.api.create_pod("p", one("nginx"), json!({}));
    w.api.create_pod("q", one("nginx"), json!({}));
    w.api.until("p", "ready", ready).await;
    w.api.until("q", "ready", ready).await;
    w.stop().await;
    let before = w.runtime.calls().len();
    // While no agent looks: one pod is deleted by force, one ends a run, and something unknown lies around.
    w.api.remove_pod("q", 0);
    w.runtime.leave_orphan("stranger");
    w.runtime.finish("c", 2);
    w.start();
    until("orphans gone", || w.runtime.sandboxes() == 1).await;
    let s = w
        .api
        .until("p", "ready again", |s| ready(s) && container(s, "c").restart_count <= 1)
        .await;
    assert!(running(&s));
    assert!(
        !w.runtime.calls()[before..].iter().any(|c| c.starts_with("sandbox")),
        "{:?}",
        &w.runtime.calls()[before..]
    );
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_sandbox_is_made_anew() {
    let mut w = World::new();
    w.start();
    w.runtime.sandboxes_fail(Some("no address left"));
    w.api.create_pod("p", one("nginx"), json!({}));
    until("FailedCreatePodSandBox", || {
        w.api
            .events("p")
            .iter()
            .any(|e| e.0 == "FailedCreatePodSandBox" && e.1.contains("no address left"))
    })
    .await;
    w.runtime.sandboxes_fail(None);
    w.api.until("p", "ready", ready).await;
    let id = sandbox::Runtime::list_sandboxes(&*w.runtime).await.unwrap()[0]
        .id
        .clone();
    sandbox::Runtime::stop_sandbox(&*w.runtime, &id).await.unwrap();
    w.api
        .until("p", "ready again", |s| ready(s) && container(s, "c").restart_count == 1)
        .await;
    let all = sandbox::Runtime::list_sandboxes(&*w.runtime).await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].pod.attempt, 1);
    w.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_forced_delete_is_quick_and_a_new_pod_of_the_name_is_another() {
    let mut w = World::new();
    w.start();
    w.runtime.stubborn(true);
    w.api.create_pod("p", one("nginx"), json!({}));
    w.api.until("p", "ready", ready).await;
    w.api.remove_pod("p", 0);
    let begun = Instant::now();
    w.api.create_pod("p", one("nginx"), json!({}));
    w.api.until("p", "ready", ready).await;
    assert!(begun.elapsed() < Duration::from_millis(500));
    until("old one gone", || w.runtime.sandboxes() == 1).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    w.stop().await;
}
