//! ARM resource ids: compared without regard to case, echoed in the casing they were created with.

use sha2::{Digest, Sha256};
use thiserror::Error;

/// A parsed ARM id below a subscription, such as
/// `/subscriptions/S/resourceGroups/G/providers/Microsoft.Network/virtualNetworks/V/subnets/N`.
///
/// # Source
/// Azure Resource Manager, "Resource ID format"; segments alternate type and name after the provider namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ArmId {
    pub subscription: String,
    /// Absent for subscription-scoped resources.
    pub resource_group: Option<String>,
    /// Provider namespace, `Microsoft.Network`; empty for the resource group itself.
    pub provider: String,
    /// `(type, name)` pairs, outermost first; empty for the resource group itself.
    pub segments: Vec<(String, String)>,
}

#[derive(Debug, Error, Eq, PartialEq)]
pub enum IdError {
    #[error("ARM id {id:?} must start with /subscriptions/<id>")]
    NoSubscription { id: String },
    #[error("ARM id {id:?} ends in the middle of a type and name pair")]
    Dangling { id: String },
}

impl ArmId {
    /// Parses an id; literals are matched without regard to case, names keep their casing.
    pub fn parse(id: &str) -> Result<Self, IdError> {
        let mut parts = id.trim_matches('/').split('/').filter(|p| !p.is_empty());
        let lit = parts.next().unwrap_or_default();
        let sub = parts.next();
        let (true, Some(subscription)) = (lit.eq_ignore_ascii_case("subscriptions"), sub) else {
            return Err(IdError::NoSubscription { id: id.to_owned() });
        };
        let rest: Vec<&str> = parts.collect();
        let mut out = Self {
            subscription: subscription.to_owned(),
            resource_group: None,
            provider: String::new(),
            segments: vec![],
        };
        let mut at = 0;
        if rest.first().is_some_and(|p| p.eq_ignore_ascii_case("resourceGroups")) {
            let name = rest.get(1).ok_or_else(|| IdError::Dangling { id: id.to_owned() })?;
            out.resource_group = Some((*name).to_owned());
            at = 2;
        }
        if rest.get(at).is_some_and(|p| p.eq_ignore_ascii_case("providers")) {
            let ns = rest
                .get(at + 1)
                .ok_or_else(|| IdError::Dangling { id: id.to_owned() })?;
            out.provider = (*ns).to_owned();
            at += 2;
        }
        let tail = &rest[at..];
        if !tail.len().is_multiple_of(2) {
            return Err(IdError::Dangling { id: id.to_owned() });
        }
        out.segments = tail.chunks(2).map(|c| (c[0].to_owned(), c[1].to_owned())).collect();
        Ok(out)
    }

    /// Name of the innermost resource; the resource group's name if there is no provider part.
    pub fn name(&self) -> &str {
        match self.segments.last() {
            Some((_, name)) => name,
            None => self.resource_group.as_deref().unwrap_or(&self.subscription),
        }
    }

    /// Id of the enclosing resource, or `None` if this is a top-level resource or a group.
    pub fn parent(&self) -> Option<Self> {
        (self.segments.len() > 1).then(|| {
            let mut up = self.clone();
            up.segments.pop();
            up
        })
    }
}

impl std::fmt::Display for ArmId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/subscriptions/{}", self.subscription)?;
        if let Some(g) = &self.resource_group {
            write!(f, "/resourceGroups/{g}")?;
        }
        if !self.provider.is_empty() {
            write!(f, "/providers/{}", self.provider)?;
        }
        self.segments.iter().try_for_each(|(t, n)| write!(f, "/{t}/{n}"))
    }
}

/// Home object name of an ARM id: `<slug>-<12 hex>`, where the slug is the last name reduced to `[a-z0-9-]` (at most 40
/// characters) and the hex digits are the start of SHA-256 over the id folded to lower case.
pub fn object_name(arm_id: &str) -> String {
    let folded = arm_id.trim_end_matches('/').to_lowercase();
    let hash = Sha256::digest(folded.as_bytes());
    let hex: String = hash[..6].iter().map(|b| format!("{b:02x}")).collect();
    let last = folded.rsplit('/').next().unwrap_or_default();
    let slug: String = last
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(40)
        .collect();
    let slug = slug.trim_matches('-');
    if slug.is_empty() { hex } else { format!("{slug}-{hex}") }
}

/// Label with the object name of the resource group, on everything inside one.
pub const GROUP_LABEL: &str = "oaks.internal/group";
/// Finalizer of a resource group: everything in it goes first, in dependency order.
pub const GROUP_FINALIZER: &str = "oaks.internal/group-contents";

/// ARM id of a resource group.
pub fn group_id(subscription: &str, group: &str) -> String {
    format!("/subscriptions/{subscription}/resourceGroups/{group}")
}

/// Labels that a home object with this ARM id carries: [`GROUP_LABEL`] if it lies in a resource group.
pub fn labels_of(arm_id: &str) -> std::collections::BTreeMap<String, String> {
    let mut out = std::collections::BTreeMap::new();
    if let Ok(ArmId {
        subscription,
        resource_group: Some(group),
        provider,
        ..
    }) = ArmId::parse(arm_id)
        && !provider.is_empty()
    {
        out.insert(GROUP_LABEL.to_owned(), object_name(&group_id(&subscription, &group)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_nested_ids_and_prints_them_back() {
        let s = "/subscriptions/S/resourceGroups/Rg/providers/Microsoft.Network/virtualNetworks/V/subnets/nodes";
        let id = ArmId::parse(s).unwrap();
        assert_eq!(id.name(), "nodes");
        assert_eq!(id.to_string(), s);
        assert_eq!(id.parent().unwrap().name(), "V");
    }

    #[test]
    fn names_ignore_casing_of_the_id() {
        let a = object_name("/subscriptions/S/resourceGroups/RG/providers/Microsoft.Network/virtualNetworks/Net_1");
        let b = object_name("/SUBSCRIPTIONS/s/resourcegroups/rg/providers/microsoft.network/virtualnetworks/net_1");
        assert_eq!(a, b);
        assert!(a.starts_with("net-1-"), "{a}");
    }

    #[test]
    fn refuses_a_dangling_type() {
        assert!(matches!(
            ArmId::parse("/subscriptions/s/resourceGroups"),
            Err(IdError::Dangling { .. })
        ));
        assert!(matches!(
            ArmId::parse("/resourceGroups/x"),
            Err(IdError::NoSubscription { .. })
        ));
    }
}
