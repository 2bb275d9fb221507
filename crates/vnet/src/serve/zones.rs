//! Answers from private zones: the longest zone that a name lies in, then the name, then its wildcard.
//!
//! # Source
//! RFC 1034 section 4.3.2, RFC 2308 (absence carries the SOA record), RFC 4592 (a wildcard counts where nothing else is).

use std::collections::{BTreeMap, BTreeSet};

use hickory_proto::rr::rdata::{A, AAAA, CNAME, MX, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use vnet_model::private_dns::default_soa;
use vnet_model::zone::{RecordData, Soa, ZoneSpec};

/// The zones linked to one virtual network, by name.
#[derive(Default)]
pub struct Zones(BTreeMap<String, Zone>);

struct Zone {
    /// Record sets by whole name.
    sets: BTreeMap<String, Vec<(u32, RecordData)>>,
    /// Every name that has records or lies above one that has.
    names: BTreeSet<String>,
    soa: Record,
    fallback: bool,
}

/// What the zones say of a name and type.
pub enum Found {
    /// No zone has the name: others may.
    NotOurs,
    /// Records, at least one.
    Records(Vec<Record>),
    /// The name is another one's.
    Alias(Record, String),
    /// The name is there without records of this type; the SOA record says for how long.
    NoData(Record),
    /// There is no such name. `true`: it may be asked for outside.
    NoName(Record, bool),
}

impl Zones {
    pub fn of(specs: &[ZoneSpec]) -> Self {
        Self(
            specs
                .iter()
                .filter_map(|s| Some((s.name.clone(), Zone::of(s)?)))
                .collect(),
        )
    }

    /// Looks up a name, in lower case without a last dot. `owner` is the name that the records are given.
    pub fn find(&self, name: &str, owner: &Name, kind: RecordType) -> Found {
        let mut suffix = Some(name);
        while let Some(zone_name) = suffix {
            if let Some(zone) = self.0.get(zone_name) {
                return zone.find(name, zone_name, owner, kind);
            }
            suffix = zone_name.split_once('.').map(|(_, rest)| rest);
        }
        Found::NotOurs
    }
}

impl Zone {
    fn of(spec: &ZoneSpec) -> Option<Self> {
        let mut sets: BTreeMap<String, Vec<(u32, RecordData)>> = BTreeMap::new();
        let mut names = BTreeSet::from([spec.name.clone()]);
        let mut soa = (3600, default_soa());
        for record in &spec.records {
            if let RecordData::Soa(own) = &record.data {
                soa = (record.ttl_s, own.clone());
            }
            let whole = match record.name.as_str() {
                "@" => spec.name.clone(),
                name => format!("{name}.{}", spec.name),
            };
            let mut above = whole.as_str();
            while above != spec.name && names.insert(above.to_owned()) {
                above = above.split_once('.').map_or("", |(_, rest)| rest);
            }
            sets.entry(whole).or_default().push((record.ttl_s, record.data.clone()));
        }
        let at = Name::from_ascii(format!("{}.", spec.name)).ok()?;
        let (ttl_s, soa) = soa;
        // How long an absence is remembered: the smaller of the record's own time and its minimum.
        let ttl_s = ttl_s.min(soa.minimum_s);
        Some(Self {
            sets,
            names,
            soa: Record::from_rdata(at, ttl_s, soa_data(&soa)?),
            fallback: spec.fallback,
        })
    }

    fn find(&self, name: &str, zone: &str, owner: &Name, kind: RecordType) -> Found {
        let Some(sets) = self.sets.get(name).or_else(|| self.wildcard(name, zone)) else {
            return match self.names.contains(name) {
                true if name == zone && kind == RecordType::SOA => Found::Records(vec![self.soa.clone()]),
                true => Found::NoData(self.soa.clone()),
                false => Found::NoName(self.soa.clone(), self.fallback),
            };
        };
        for (ttl_s, data) in sets {
            if let RecordData::Cname(target) = data
                && kind != RecordType::CNAME
                && let Some(to) = absolute(target)
            {
                let record = Record::from_rdata(owner.clone(), *ttl_s, RData::CNAME(CNAME(to)));
                return Found::Alias(record, target.clone());
            }
        }
        let mut out = Vec::new();
        for (ttl_s, data) in sets {
            let fitting = rdata(data)
                .into_iter()
                .filter(|d| kind == RecordType::ANY || d.record_type() == kind);
            out.extend(fitting.map(|d| Record::from_rdata(owner.clone(), *ttl_s, d)));
        }
        match out.is_empty() {
            true if name == zone && kind == RecordType::SOA => Found::Records(vec![self.soa.clone()]),
            true => Found::NoData(self.soa.clone()),
            false => Found::Records(out),
        }
    }

    /// The wildcard that stands for a name that is not there: the one below the closest name that is.
    fn wildcard(&self, name: &str, zone: &str) -> Option<&Vec<(u32, RecordData)>> {
        if self.names.contains(name) {
            return None;
        }
        let mut above = name;
        while above != zone {
            above = above.split_once('.')?.1;
            if self.names.contains(above) {
                return self.sets.get(&format!("*.{above}"));
            }
        }
        None
    }
}

fn absolute(name: &str) -> Option<Name> {
    // An empty alias is one that nobody has filled yet.
    if name.is_empty() {
        None
    } else {
        Name::from_ascii(format!("{name}.")).ok()
    }
}

fn soa_data(soa: &Soa) -> Option<RData> {
    let signed = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    Some(RData::SOA(SOA::new(
        absolute(&soa.host)?,
        absolute(&soa.email)?,
        soa.serial,
        signed(soa.refresh_s),
        signed(soa.retry_s),
        signed(soa.expire_s),
        soa.minimum_s,
    )))
}

fn rdata(data: &RecordData) -> Vec<RData> {
    let names = |names: &[String]| names.iter().filter_map(|n| absolute(n)).collect::<Vec<Name>>();
    match data {
        RecordData::A(all) => all.iter().map(|a| RData::A(A(*a))).collect(),
        RecordData::Aaaa(all) => all.iter().map(|a| RData::AAAA(AAAA(*a))).collect(),
        RecordData::Cname(target) => absolute(target).into_iter().map(|n| RData::CNAME(CNAME(n))).collect(),
        RecordData::Mx(all) => all
            .iter()
            .filter_map(|(preference, to)| Some(RData::MX(MX::new(*preference, absolute(to)?))))
            .collect(),
        RecordData::Ptr(all) => names(all).into_iter().map(|n| RData::PTR(PTR(n))).collect(),
        RecordData::Soa(soa) => soa_data(soa).into_iter().collect(),
        RecordData::Srv(all) => all
            .iter()
            .filter_map(|(priority, weight, port, to)| {
                Some(RData::SRV(SRV::new(*priority, *weight, *port, absolute(to)?)))
            })
            .collect(),
        RecordData::Txt(all) => all.iter().map(|t| RData::TXT(TXT::new(t.clone()))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use vnet_model::zone::ZoneRecord;

    use super::*;

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

    fn a(last: u8) -> RecordData {
        RecordData::A(vec![[10, 0, 0, last].into()])
    }

    /// One letter and the data: what the zones say.
    fn say(zones: &Zones, name: &str, kind: RecordType) -> String {
        let owner = Name::from_ascii(format!("{name}.")).unwrap();
        match zones.find(name, &owner, kind) {
            Found::NotOurs => "not ours".to_owned(),
            Found::Records(r) => r.iter().map(|r| r.data.to_string()).collect::<Vec<_>>().join(" "),
            Found::Alias(_, to) => format!("alias {to}"),
            Found::NoData(_) => "no data".to_owned(),
            Found::NoName(..) => "no name".to_owned(),
        }
    }

    #[test]
    fn the_longest_zone_decides_and_wildcards_stand_for_what_is_not_there() {
        let zones = Zones::of(&[
            zone(
                "example.org",
                &[
                    ("www", a(1)),
                    ("*", a(2)),
                    ("a.deep", a(3)),
                    ("alias", RecordData::Cname("www.example.org".into())),
                    ("sub", a(9)),
                    ("@", RecordData::Txt(vec![vec!["hello".into()]])),
                ],
            ),
            zone("sub.example.org", &[("www", a(4))]),
        ]);
        for (name, kind, wanted) in [
            ("www.example.org", RecordType::A, "10.0.0.1"),
            ("www.example.org", RecordType::AAAA, "no data"),
            ("any.example.org", RecordType::A, "10.0.0.2"),
            ("any.more.example.org", RecordType::A, "10.0.0.2"),
            // A name above one that has records is there, and shadows the wildcard.
            ("deep.example.org", RecordType::A, "no data"),
            ("b.deep.example.org", RecordType::A, "no name"),
            ("alias.example.org", RecordType::A, "alias www.example.org"),
            ("alias.example.org", RecordType::CNAME, "www.example.org."),
            ("www.sub.example.org", RecordType::A, "10.0.0.4"),
            ("no.sub.example.org", RecordType::A, "no name"),
            ("sub.example.org", RecordType::A, "no data"),
            ("example.org", RecordType::TXT, "hello"),
            ("example.com", RecordType::A, "not ours"),
            ("notexample.org", RecordType::A, "not ours"),
        ] {
            assert_eq!(say(&zones, name, kind), wanted, "{name} {kind}");
        }
        assert!(say(&zones, "example.org", RecordType::SOA).contains("azureprivatedns.net"));
    }
}
