//! Public addresses that are no frontends: NAT gateways, instances, outbound rules.

use std::net::Ipv4Addr;

use super::{Door, SpecError};
use crate::fabric::{FrontendSpec, InstanceAddressSpec, NatGatewaySpec, OutboundSpec, Protocol, VnetSpec};

/// SNAT ports start above the well-known ones.
pub const FIRST_SNAT_PORT: u16 = 1024;

fn public(vnet: &VnetSpec, what: &'static str, key: &str, reason: String) -> SpecError {
    SpecError::Public {
        vnet: vnet.key.clone(),
        what,
        key: key.to_owned(),
        reason,
    }
}

impl Door<'_> {
    /// What keeps `address` from being a public address of this network; `shared` allows one that is its frontend.
    fn taken(&self, address: Ipv4Addr, shared: bool) -> Option<String> {
        if !self.edge.pool.contains(&address) {
            return Some(format!("{address} is not of the public pool {}", self.edge.pool));
        }
        if self.edge.endpoints.contains(&address) || self.seen.exclusive.contains(&address) {
            return Some(format!("{address} is in use"));
        }
        match self.seen.public.get(&address) {
            Some(vnet) if *vnet != self.vnet.key => Some(format!("{address} belongs to another virtual network")),
            Some(_) if !shared => Some(format!("{address} is in use")),
            _ => None,
        }
    }

    fn take(&mut self, address: Ipv4Addr) {
        self.seen.public.insert(address, self.vnet.key.clone());
        self.seen.exclusive.insert(address);
    }

    pub(super) fn gateway(&mut self, gateway: &NatGatewaySpec) -> Result<(), SpecError> {
        if let Some(reason) = gateway.addresses.iter().find_map(|a| self.taken(*a, false)) {
            return Err(public(self.vnet, "NAT gateway", &gateway.key, reason));
        }
        gateway.addresses.iter().for_each(|a| self.take(*a));
        Ok(())
    }

    pub(super) fn instance(&mut self, instance: &InstanceAddressSpec) -> Result<(), SpecError> {
        let key = instance.private.to_string();
        let vnet = self.vnet;
        let fail = |reason| public(vnet, "instance address", &key, reason);
        if let Some(reason) = self.taken(instance.public, false) {
            return Err(fail(reason));
        }
        if !self.seen.addresses.contains(&instance.private) {
            return Err(fail("no NIC of the virtual network has it".to_owned()));
        }
        if !self.seen.instances.insert(instance.private) {
            return Err(fail("it has two public addresses".to_owned()));
        }
        self.take(instance.public);
        Ok(())
    }

    pub(super) fn outbound(&mut self, rule: &OutboundSpec) -> Result<(), SpecError> {
        let key = rule.private.to_string();
        let vnet = self.vnet;
        let fail = |reason| public(vnet, "outbound rule of", &key, reason);
        if let Some(reason) = self.taken(rule.public, true) {
            return Err(fail(reason));
        }
        if rule.first_port < FIRST_SNAT_PORT || rule.last_port < rule.first_port {
            let ports = (rule.first_port, rule.last_port);
            return Err(fail(format!("{ports:?} are no SNAT ports")));
        }
        if !self.seen.addresses.contains(&rule.private) {
            return Err(fail("no NIC of the virtual network has it".to_owned()));
        }
        let protocols: &[Protocol] = match rule.protocol {
            Protocol::All => &[Protocol::Tcp, Protocol::Udp],
            Protocol::Tcp => &[Protocol::Tcp],
            Protocol::Udp => &[Protocol::Udp],
        };
        if protocols
            .iter()
            .any(|p| self.seen.outbound.contains(&(rule.private, *p)))
        {
            return Err(fail("it has two outbound rules for one protocol".to_owned()));
        }
        self.seen.outbound.extend(protocols.iter().map(|p| (rule.private, *p)));
        self.seen.public.insert(rule.public, self.vnet.key.clone());
        Ok(())
    }

    /// What is wrong with a frontend beside its address.
    pub(super) fn frontend_fields(&self, f: &FrontendSpec) -> Option<&'static str> {
        let whole = f.protocol == Protocol::All && f.port == 0;
        if f.port == 0 && !whole {
            return Some("port 0 stands for every port, which only protocol All can mean");
        }
        if whole && self.edge.pool.contains(&f.address) {
            return Some("every port at once is for addresses inside the virtual network only");
        }
        if f.backends.iter().any(|b| whole != (b.port == 0)) {
            return Some("a backend has port 0 exactly if the frontend has");
        }
        let probe = f.probe.as_ref()?;
        (probe.port == 0 || probe.threshold == 0 || probe.interval_ms == 0)
            .then_some("a probe needs a port, an interval and a threshold")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::tests::spec;
    use crate::fabric::{BackendSpec, FabricSpec};

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    fn instance(private: &str, public: &str) -> InstanceAddressSpec {
        InstanceAddressSpec {
            private: ip(private),
            public: ip(public),
            idle_timeout_s: 0,
        }
    }

    fn outbound(private: &str, public: &str, first_port: u16) -> OutboundSpec {
        OutboundSpec {
            private: ip(private),
            protocol: Protocol::All,
            public: ip(public),
            first_port,
            last_port: first_port.saturating_add(7),
            idle_timeout_s: 240,
        }
    }

    fn gateway(addresses: &[&str]) -> NatGatewaySpec {
        NatGatewaySpec {
            key: "g".into(),
            addresses: addresses.iter().map(|a| ip(a)).collect(),
            idle_timeout_s: 240,
        }
    }

    fn good() -> FabricSpec {
        let mut s = spec();
        let v = &mut s.vnets[0];
        v.subnets[0].nat_gateway = Some("g".into());
        v.nat_gateways = vec![gateway(&["198.19.0.4", "198.19.0.5"])];
        v.instance_addresses = vec![instance("10.1.0.4", "198.19.0.6")];
        v.frontends = vec![FrontendSpec::new(ip("198.19.0.7"), Protocol::Tcp, 80, vec![])];
        v.outbound = vec![outbound("10.1.0.5", "198.19.0.7", 1024)];
        s
    }

    #[test]
    fn public_addresses_have_one_use_each() {
        good().check().unwrap();
        let check = |change: &dyn Fn(&mut FabricSpec), wanted: &str| {
            let mut s = good();
            change(&mut s);
            let error = s.check().unwrap_err().to_string();
            assert!(error.contains(wanted), "{error} should contain {wanted}");
            // Left out, the rest is fine.
            s.without_mistakes().0.check().unwrap();
        };
        check(
            &|s| s.vnets[0].instance_addresses[0].public = ip("198.19.0.5"),
            "instance address 10.1.0.4: 198.19.0.5 is in use",
        );
        check(
            &|s| s.vnets[0].nat_gateways[0].addresses[0] = ip("198.19.0.7"),
            "198.19.0.7 is in use",
        );
        check(
            &|s| s.vnets[0].nat_gateways[0].addresses[0] = ip("192.0.2.1"),
            "not of the public pool",
        );
        check(&|s| s.vnets[0].instance_addresses[0].private = ip("10.1.0.9"), "no NIC");
        check(
            &|s| {
                let twice = instance("10.1.0.4", "198.19.0.9");
                s.vnets[0].instance_addresses.push(twice);
            },
            "two public addresses",
        );
        check(
            &|s| s.vnets[0].outbound.push(outbound("10.1.0.5", "198.19.0.7", 2048)),
            "two outbound rules",
        );
        check(&|s| s.vnets[0].outbound[0].first_port = 80, "no SNAT ports");
        check(&|s| s.vnets[0].frontends[0].port = 0, "port 0 stands for every port");
        check(
            &|s| {
                s.vnets[0].frontends[0].backends = vec![BackendSpec {
                    address: ip("10.1.0.4"),
                    port: 0,
                }];
            },
            "port 0 exactly if",
        );
    }

    #[test]
    fn a_subnet_names_a_gateway_that_is_there() {
        let mut s = good();
        s.vnets[0].nat_gateways.clear();
        let error = s.check().unwrap_err();
        assert_eq!(error.code(), "InvalidResourceReference");
        assert!(error.to_string().contains("nodes names NAT gateway g"), "{error}");
    }
}
