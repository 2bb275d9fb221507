//! The whole loop against a scripted API: a change of objects becomes rules and names in a namespace.

use std::{
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use linux::{
    netns,
    nft::{Family, Nft},
};
use parking_lot::Mutex;
use reconcile::{Body, BoxError, Client, Informers, LocalService, full_body};
use serde_json::{Value, json};
use service_proxy::{Mode, ProxyConfig, remove, run};
use stdx::Shutdown;
use tokio::sync::mpsc;

type Watches = Arc<Mutex<Vec<(&'static str, mpsc::Sender<Value>)>>>;

/// Empty lists, then what the test sends to the watches.
fn api(watches: Watches) -> Client {
    Client::local(LocalService::new(tower::service_fn(move |request: Request<Body>| {
        let watches = watches.clone();
        async move {
            let uri = request.uri().to_string();
            let kind = if uri.contains("endpointslices") {
                "EndpointSlice"
            } else {
                "Service"
            };
            if !uri.contains("watch=") {
                let list = json!({"kind": format!("{kind}List"), "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []});
                return Ok::<_, BoxError>(Response::new(full_body(list.to_string())));
            }
            let (frames, mut next) = mpsc::channel::<Value>(8);
            watches.lock().push((kind, frames));
            let (mut out, body) = http_body_util::channel::Channel::<Bytes, BoxError>::new(4);
            tokio::spawn(async move {
                while let Some(frame) = next.recv().await {
                    let _ = out.send_data(Bytes::from(format!("{frame}\n"))).await;
                }
            });
            Ok(Response::new(Body::new(body)))
        }
    })))
}

async fn send(watches: &Watches, kind: &'static str, frame: Value) {
    let found = eventually(|| watches.lock().iter().find(|w| w.0 == kind).map(|w| w.1.clone())).await;
    found.send(frame).await.unwrap();
}

async fn eventually<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    for _ in 0..500 {
        if let Some(found) = probe() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not become true within 5 s");
}

fn resolves(netns: &Path, server: SocketAddr) -> bool {
    // Question: web.d.svc.cluster.local A; an answer with one record has ANCOUNT 1.
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["web", "d", "svc", "cluster", "local"] {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = netns::run_in(netns, || UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut buffer = [0; 512];
    socket.send_to(&query, server).is_ok() && socket.recv_from(&mut buffer).is_ok() && buffer[7] == 1
}

fn chains(netns: &Path, mode: &Mode) -> Vec<String> {
    let mut nft = Nft::open_in(&netns::open(netns).unwrap()).unwrap();
    nft.chains(Family::Ip, &mode.table()).unwrap()
}

fn follows(mode: Mode, dns: SocketAddr) {
    let body = move || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let path = PathBuf::from("/run/t/m");
        netns::create_named(&path).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let watches = Watches::default();
            let shutdown = Shutdown::new();
            let config = ProxyConfig {
                informers: Informers::new(api(watches.clone())),
                netns: Some(path.clone()),
                node_name: "n1".into(),
                dns_ip: Some(Ipv4Addr::new(10, 0, 0, 10)),
                domain: "cluster.local".into(),
                mode: mode.clone(),
                upstream_dns: None,
                shutdown: shutdown.clone(),
            };
            let running = tokio::spawn(run(config));
            let meta = |name: &str, rv: &str, labels: Value| {
                json!({"namespace": "d", "name": name, "uid": name, "resourceVersion": rv, "labels": labels})
            };
            let service = json!({"type": "ADDED", "object": {"apiVersion": "v1", "kind": "Service",
                "metadata": meta("web", "2", json!({})),
                "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]}}});
            send(&watches, "Service", service).await;
            eventually(|| resolves(&path, dns).then_some(())).await;
            let chain = "svc/d/web/tcp/80".to_owned();
            assert!(!chains(&path, &mode).contains(&chain), "no endpoint yet");
            let slice = json!({"type": "ADDED", "object": {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": meta("web-1", "3", json!({"kubernetes.io/service-name": "web"})), "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.1.0.4"]}], "ports": [{"port": 8080}]}});
            send(&watches, "EndpointSlice", slice.clone()).await;
            eventually(|| chains(&path, &mode).contains(&chain).then_some(())).await;

            let mut gone = slice;
            gone["type"] = json!("DELETED");
            gone["object"]["metadata"]["resourceVersion"] = json!("4");
            send(&watches, "EndpointSlice", gone).await;
            eventually(|| (!chains(&path, &mode).contains(&chain)).then_some(())).await;

            shutdown.trigger();
            running.await.unwrap().unwrap();
            assert!(!chains(&path, &mode).is_empty(), "rules stay while the process is replaced");
            remove(Some(&path), &mode).unwrap();
            assert!(chains(&path, &mode).is_empty());
        });
    };
    std::thread::spawn(body).join().unwrap();
}

#[test]
fn in_a_machine_dns_owns_its_address() {
    follows(Mode::Machine, "10.0.0.10:53".parse().unwrap());
}

#[test]
fn in_a_vnet_dns_listens_where_it_is_told() {
    let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 5399);
    follows(
        Mode::Group {
            mark: 7,
            dns_listen: listen,
        },
        listen.into(),
    );
}
