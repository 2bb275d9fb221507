//! The DNS server over real sockets, asked by a small client of its own.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata::A},
};
use parking_lot::RwLock;
use serde_json::json;
use service_proxy::{
    dns::{Server, ServerConfig, Zone, server::Sockets},
    world::World,
};
use stdx::Shutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
};

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const WAIT: Duration = Duration::from_secs(5);

fn zone(endpoints: u8) -> Zone {
    let service = |name: &str, spec| {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec})).unwrap(),
        )
    };
    let ends: Vec<_> = (1..=endpoints)
        .map(|i| json!({"addresses": [format!("10.1.0.{i}")]}))
        .collect();
    let slice = json!({"metadata": {"namespace": "shop", "name": "db", "labels": {"kubernetes.io/service-name": "db"}},
        "addressType": "IPv4", "endpoints": ends, "ports": [{"name": "sql", "port": 5432}]});
    let services = [
        service(
            "web",
            json!({"clusterIP": "10.0.0.5", "ports": [{"name": "http", "port": 80}]}),
        ),
        service(
            "db",
            json!({"clusterIP": "None", "ports": [{"name": "sql", "port": 5432}]}),
        ),
        service(
            "out",
            json!({"type": "ExternalName", "externalName": "www.example.org"}),
        ),
    ];
    Zone::new(
        "cluster.local",
        &World::new(&services, &[Arc::new(serde_json::from_value(slice).unwrap())], "n"),
    )
}

struct Running {
    udp: SocketAddr,
    tcp: SocketAddr,
    shutdown: Shutdown,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

async fn start(zone: Zone, upstream: Option<SocketAddr>) -> Running {
    let udp = UdpSocket::bind(LOOPBACK).await.unwrap();
    let tcp = TcpListener::bind(LOOPBACK).await.unwrap();
    let shutdown = Shutdown::new();
    let out = Running {
        udp: udp.local_addr().unwrap(),
        tcp: tcp.local_addr().unwrap(),
        shutdown: shutdown.clone(),
    };
    let config = ServerConfig {
        udp,
        tcp,
        sockets: Sockets::default(),
        upstream,
        upstream_wait: Duration::from_millis(100),
    };
    tokio::spawn(Server::new(config, Arc::new(RwLock::new(Arc::new(zone)))).run(shutdown));
    out
}

/// Answers every A question with 192.0.2.1 after a stray answer with a wrong id.
async fn upstream() -> SocketAddr {
    let udp = UdpSocket::bind(LOOPBACK).await.unwrap();
    let tcp = TcpListener::bind(udp.local_addr().unwrap()).await.unwrap();
    let address = udp.local_addr().unwrap();
    fn answer(raw: &[u8]) -> Message {
        let query = Message::from_vec(raw).unwrap();
        let mut reply = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
        reply.add_queries(query.queries.iter().cloned());
        let name = query.queries[0].name.clone();
        reply.add_answer(Record::from_rdata(name, 60, RData::A(A(Ipv4Addr::new(192, 0, 2, 1)))));
        reply
    }
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((n, from)) = udp.recv_from(&mut buffer).await {
            let mut stray = answer(&buffer[..n]);
            stray.metadata.id ^= 1;
            udp.send_to(&stray.to_vec().unwrap(), from).await.unwrap();
            udp.send_to(&answer(&buffer[..n]).to_vec().unwrap(), from)
                .await
                .unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut s, _)) = tcp.accept().await {
            let raw = read_frame(&mut s).await;
            write_frame(&mut s, &answer(&raw).to_vec().unwrap()).await;
        }
    });
    address
}

async fn read_frame(s: &mut TcpStream) -> Vec<u8> {
    let size = s.read_u16().await.unwrap();
    let mut raw = vec![0; size.into()];
    s.read_exact(&mut raw).await.unwrap();
    raw
}

async fn write_frame(s: &mut TcpStream, raw: &[u8]) {
    s.write_u16(raw.len() as u16).await.unwrap();
    s.write_all(raw).await.unwrap();
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut m = Message::new(4711, MessageType::Query, OpCode::Query);
    m.metadata.recursion_desired = true;
    m.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    m
}

async fn ask_raw(server: &Running, raw: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.connect(server.udp).await.unwrap();
    socket.send(raw).await.unwrap();
    let mut buffer = vec![0; 4096];
    let n = tokio::time::timeout(WAIT, socket.recv(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    buffer.truncate(n);
    buffer
}

async fn ask(server: &Running, message: &Message) -> Message {
    let reply = Message::from_vec(&ask_raw(server, &message.to_vec().unwrap()).await).unwrap();
    assert_eq!(reply.metadata.id, message.metadata.id);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    reply
}

fn addresses(m: &Message) -> Vec<String> {
    m.answers.iter().map(|r| r.data.to_string()).collect()
}

#[tokio::test]
async fn names_of_the_cluster_over_udp_and_tcp() {
    let server = start(zone(2), None).await;
    let reply = ask(&server, &question("Web.shop.svc.Cluster.local.", RecordType::A)).await;
    assert_eq!(addresses(&reply), ["10.0.0.5"]);
    assert!(reply.metadata.authoritative && reply.metadata.recursion_available);
    assert_eq!(
        reply.answers[0].name.to_ascii(),
        "Web.shop.svc.Cluster.local.",
        "the client's casing"
    );

    let reply = ask(&server, &question("web.shop.svc.cluster.local.", RecordType::AAAA)).await;
    assert_eq!(
        (
            reply.metadata.response_code,
            reply.answers.len(),
            reply.authorities.len()
        ),
        (ResponseCode::NoError, 0, 1)
    );
    let reply = ask(&server, &question("nope.shop.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(
        (reply.metadata.response_code, reply.authorities.len()),
        (ResponseCode::NXDomain, 1)
    );
    let reply = ask(
        &server,
        &question("_sql._tcp.db.shop.svc.cluster.local.", RecordType::SRV),
    )
    .await;
    assert_eq!((reply.answers.len(), reply.additionals.len()), (2, 2));
    let reply = ask(&server, &question("5.0.0.10.in-addr.arpa.", RecordType::PTR)).await;
    assert_eq!(addresses(&reply), ["web.shop.svc.cluster.local."]);
    let reply = ask(&server, &question("10-1-0-77.shop.pod.cluster.local.", RecordType::A)).await;
    assert_eq!(addresses(&reply), ["10.1.0.77"]);

    // Endpoints of a headless Service take turns in front.
    let mut first = std::collections::BTreeSet::new();
    for _ in 0..4 {
        let reply = ask(&server, &question("db.shop.svc.cluster.local.", RecordType::A)).await;
        first.insert(addresses(&reply)[0].clone());
    }
    assert_eq!(first.len(), 2);

    let mut stream = TcpStream::connect(server.tcp).await.unwrap();
    for _ in 0..2 {
        write_frame(
            &mut stream,
            &question("web.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap(),
        )
        .await;
        let reply = Message::from_vec(&read_frame(&mut stream).await).unwrap();
        assert_eq!(addresses(&reply), ["10.0.0.5"]);
    }
}

#[tokio::test]
async fn large_answers_are_cut_by_what_the_client_takes() {
    let server = start(zone(60), None).await;
    let mut query = question("db.shop.svc.cluster.local.", RecordType::A);
    let reply = ask(&server, &query).await;
    assert!(reply.metadata.truncation && reply.answers.is_empty());
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    query.set_edns(edns);
    let reply = ask(&server, &query).await;
    assert!(!reply.metadata.truncation && reply.edns.is_some());
    assert_eq!(reply.answers.len(), 60);
    let mut stream = TcpStream::connect(server.tcp).await.unwrap();
    write_frame(
        &mut stream,
        &question("db.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap(),
    )
    .await;
    assert_eq!(
        Message::from_vec(&read_frame(&mut stream).await).unwrap().answers.len(),
        60
    );
}

#[tokio::test]
async fn other_names_go_to_the_upstream() {
    let server = start(zone(1), Some(upstream().await)).await;
    let reply = ask(&server, &question("example.org.", RecordType::A)).await;
    assert_eq!(addresses(&reply), ["192.0.2.1"]);
    let reply = ask(&server, &question("out.shop.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(
        addresses(&reply),
        ["www.example.org.", "192.0.2.1"],
        "an alias is followed"
    );
    let mut stream = TcpStream::connect(server.tcp).await.unwrap();
    write_frame(&mut stream, &question("example.org.", RecordType::A).to_vec().unwrap()).await;
    assert_eq!(
        addresses(&Message::from_vec(&read_frame(&mut stream).await).unwrap()),
        ["192.0.2.1"]
    );

    // A name of ours never leaves.
    let reply = ask(&server, &question("nope.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_silent_upstream_and_hostile_queries_get_an_error_each() {
    let silent = UdpSocket::bind(LOOPBACK).await.unwrap();
    let server = start(zone(1), Some(silent.local_addr().unwrap())).await;
    let reply = ask(&server, &question("example.org.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    let reply = ask(&server, &question("out.shop.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(addresses(&reply), ["www.example.org."]);

    let mut update = question("example.org.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    let code = |raw: Vec<u8>| raw[3] & 0xf;
    assert_eq!(code(ask_raw(&server, &update.to_vec().unwrap()).await), 4, "NOTIMP");
    let mut garbage = vec![0x12, 0x34, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0];
    garbage.extend([0xff; 20]);
    let reply = ask_raw(&server, &garbage).await;
    assert_eq!((&reply[..2], code(reply.clone())), (&[0x12, 0x34][..], 1), "FORMERR");
    // Answers and scraps are ignored: the next real question is answered first.
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.connect(server.udp).await.unwrap();
    let mut answer = question("web.shop.svc.cluster.local.", RecordType::A);
    answer.metadata.message_type = MessageType::Response;
    socket.send(&answer.to_vec().unwrap()).await.unwrap();
    socket.send(b"x").await.unwrap();
    let mut real = question("web.shop.svc.cluster.local.", RecordType::A);
    real.metadata.id = 9;
    socket.send(&real.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 512];
    let n = tokio::time::timeout(WAIT, socket.recv(&mut buffer))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(Message::from_vec(&buffer[..n]).unwrap().metadata.id, 9);
}
