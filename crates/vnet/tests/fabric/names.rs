//! Private zones and the metadata service as machines see them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::common::*;
use vnet::{Fabric, Token, TokenFuture, TokenSource};
use vnet_model::fabric::PeerSpec;
use vnet_model::instance::{IdentitySpec, InstanceSpec};
use vnet_model::zone::{RecordData, ZoneRecord, ZoneSpec};

fn zone(name: &str, records: &[(&str, RecordData)]) -> ZoneSpec {
    let record = |(name, data): &(&str, RecordData)| ZoneRecord {
        name: (*name).to_owned(),
        ttl_s: 60,
        data: data.clone(),
    };
    ZoneSpec {
        name: name.to_owned(),
        records: records.iter().map(record).collect(),
        ..ZoneSpec::default()
    }
}

fn a(address: &str) -> RecordData {
    RecordData::A(vec![ip(address)])
}

#[test]
fn a_private_zone_is_seen_by_its_networks_only() {
    on_a_host(|| {
        let shared = zone("example.org", &[("www", a("10.9.0.1"))]);
        let mut v1 = vnet("v1", &[nic("a", "10.1.0.4")]);
        v1.private_zones = vec![shared.clone(), zone("sub.example.org", &[("www", a("10.9.0.2"))])];
        let mut v2 = vnet("v2", &[nic("b", "10.1.0.4")]);
        v2.private_zones = vec![shared];
        let v3 = vnet("v3", &[nic("c", "10.1.0.4")]);
        let mut spec = fabric_spec(&[v1, v2, v3]);
        let fabric = Fabric::open("t", RUN).unwrap();
        let runtime = runtime();
        fabric.serve(runtime.handle());
        fabric.apply(&spec).unwrap();
        let [a1, b2, c3] = ["a", "b", "c"].map(|n| Machine::boot(&fabric, n));
        let found = |m: &Machine, name: &str| m.run(|| resolve(name));
        let yes = |address: &str| (0, vec![ip(address).into()]);
        const NONE: u8 = 3;
        assert_eq!(found(&a1, "www.Example.org"), yes("10.9.0.1"));
        assert_eq!(
            a1.run(|| resolve_by_stream("www.sub.example.org")),
            yes("10.9.0.2"),
            "the longer zone"
        );
        assert_eq!(found(&b2, "www.example.org"), yes("10.9.0.1"));
        assert_eq!(
            found(&b2, "www.sub.example.org").0,
            NONE,
            "not linked to the longer zone"
        );
        assert_eq!(found(&c3, "www.example.org").0, NONE, "linked to none");
        assert_eq!(found(&a1, "a"), yes("10.1.0.4"), "machines' names stay");
        // A change is seen at once, and a link that goes takes the names along.
        spec.vnets[0].private_zones[0].records[0].data = a("10.9.0.3");
        spec.vnets[1].private_zones.clear();
        fabric.apply(&spec).unwrap();
        assert_eq!(found(&a1, "www.example.org"), yes("10.9.0.3"));
        assert_eq!(found(&b2, "www.example.org").0, NONE);
    });
}

struct Issuer;

impl TokenSource for Issuer {
    fn token<'a>(&'a self, identity: &'a IdentitySpec, resource: &'a str) -> TokenFuture<'a> {
        let access_token = format!("{}@{resource}", identity.client_id);
        Box::pin(async move {
            Ok(Token {
                access_token,
                not_before_s: 0,
                expires_on_s: 3600,
            })
        })
    }
}

/// A GET from `source`; the whole response, or why there is none.
fn metadata(source: Option<Ipv4Addr>, path: &str) -> Result<String, String> {
    let connect = || -> std::io::Result<TcpStream> {
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)?;
        if let Some(source) = source {
            rustix::net::bind(&socket, &std::net::SocketAddrV4::new(source, 0))?;
        }
        // A forged source gets no answer: give up soon.
        rustix::net::sockopt::set_tcp_user_timeout(&socket, 300)?;
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Send,
            Some(Duration::from_millis(300)),
        )?;
        let to = std::net::SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);
        rustix::net::connect(&socket, &to)?;
        Ok(TcpStream::from(socket))
    };
    let mut stream = connect().map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: imds\r\nMetadata: true\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| e.to_string())?;
    Ok(answer)
}

#[test]
fn a_machine_learns_who_it_is_and_nobody_else_does() {
    on_a_host(|| {
        let with_instance = |key: &str, address: &str| {
            let mut nic = nic(key, address);
            nic.instance = Some(InstanceSpec {
                name: key.to_owned(),
                identities: vec![IdentitySpec {
                    client_id: format!("id-{key}"),
                    ..IdentitySpec::default()
                }],
                ..InstanceSpec::default()
            });
            nic
        };
        // Two networks with equal ranges, and a peer.
        let mut v1 = vnet("v1", &[with_instance("a", "10.1.0.4"), nic("group", "10.1.0.9")]);
        let v2 = vnet("v2", &[with_instance("b", "10.1.0.4")]);
        let mut v3 = vnet("v3", &[]);
        v3.prefixes = vec!["10.3.0.0/16".parse().unwrap()];
        v3.subnets[0].prefix = "10.3.0.0/24".parse().unwrap();
        v3.nics = vec![with_instance("c", "10.3.0.4")];
        let half = |v: &str, prefix: &str| PeerSpec {
            vnet: v.into(),
            prefixes: vec![prefix.parse().unwrap()],
            access: true,
            forwarded: true,
        };
        v1.peers = vec![half("v3", "10.3.0.0/16")];
        v3.peers = vec![half("v1", "10.1.0.0/16")];
        let spec = fabric_spec(&[v1, v2, v3]);
        let fabric = Fabric::open("t", RUN).unwrap();
        let runtime = runtime();
        fabric.issue_tokens(Arc::new(Issuer));
        fabric.serve(runtime.handle());
        fabric.apply(&spec).unwrap();
        let [a, b, c, group] = ["a", "b", "c", "group"].map(|n| Machine::boot(&fabric, n));
        const NAME: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";
        for (machine, name) in [(&a, "a"), (&b, "b"), (&c, "c")] {
            let answer = machine.run(|| metadata(None, NAME)).unwrap();
            assert!(
                answer.starts_with("HTTP/1.1 200") && answer.ends_with(&format!("\r\n{name}")),
                "{answer}"
            );
            let token = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r";
            let answer = machine.run(|| metadata(None, token)).unwrap();
            assert!(answer.contains(&format!("id-{name}@r")), "{answer}");
        }
        let answer = group.run(|| metadata(None, NAME)).unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 403"),
            "a container group is no machine: {answer}"
        );
        // A forged source, be it another machine's of the network or a peer's, gets nothing.
        for forged in ["10.1.0.9", "10.3.0.4"] {
            a.ip(&["addr", "add", &format!("{forged}/32"), "dev", "lo"]);
            let before = dropped(&fabric, vnet::SPOOFED);
            a.run(|| metadata(Some(ip(forged)), NAME)).unwrap_err();
            assert!(dropped(&fabric, vnet::SPOOFED) > before);
        }
    });
}
