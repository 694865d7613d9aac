use super::*;
use crate::database::{Database, DatabaseSetting};
use tidemark_base::storage::RealStorage;
use tidemark_transport::KeyRequest;

const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

pub(crate) fn registrar(folder: &std::path::Path) -> Registrar {
    let storage = RealStorage::open_folder(folder);
    let database = Database::open(&DatabaseSetting::Sqlite(folder.join("config.db"))).unwrap();
    let history = Arc::new(History::open(database.clone()).unwrap());
    let store = Arc::new(Store::open(database, &*storage).unwrap());
    Registrar::new(store, history, Authority::open_or_create(&*storage).unwrap())
}

pub(crate) fn passphrase(registrar: &Registrar, role: PeerRole, uses: u32, replaces: Option<String>) -> String {
    let request = PassphraseRequest { role, lifetime_seconds: 60, uses, replaces };
    registrar.create_passphrase(&request).unwrap().passphrase.unwrap()
}

pub(crate) fn request(role: PeerRole, passphrase: &str, key: &KeyRequest) -> RegisterRequest {
    RegisterRequest {
        role,
        name: "web-1".into(),
        passphrase: passphrase.into(),
        request: hex_encode(key.request()),
        time: SystemClock::new().wall_now(),
    }
}

pub(crate) fn issued(registered: Registered) -> (PeerIdentity, Vec<u8>) {
    let Registered::Issued { identity, certificate } = registered else { panic!("{registered:?}") };
    (identity.parse().unwrap(), hex_decode(&certificate).unwrap())
}

fn message(refused: Refused) -> String {
    let Refused::Failure(failure) = refused else { panic!("{refused:?}") };
    assert!(!failure.help.is_empty());
    failure.message
}

#[test]
fn a_passphrase_registers_its_role_as_often_as_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let text = passphrase(&registrar, PeerRole::Agent, 2, None);
    let keys: Vec<KeyRequest> = (0..3).map(|_| KeyRequest::new().unwrap()).collect();
    let wrong_role = request(PeerRole::ProcessServer, &text, &keys[0]);
    assert!(message(registrar.register(HERE, &wrong_role).unwrap_err()).contains("passphrase"));
    let mut seen = Vec::new();
    for key in &keys[..2] {
        let (identity, certificate) = issued(registrar.register(HERE, &request(PeerRole::Agent, &text, key)).unwrap());
        registrar.admit(identity, Some(certificate_digest(&certificate)), "web-1").unwrap();
        seen.push(identity);
    }
    assert_ne!(seen[0], seen[1], "ids are made by the server");
    let refused = registrar.register(HERE, &request(PeerRole::Agent, &text, &keys[2])).unwrap_err();
    assert!(message(refused).contains("used up"));
    assert!(registrar.passphrases().is_empty(), "one that is used up is not kept");
}

#[test]
fn bad_registrations_are_refused_by_name_and_slowed_down() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let text = passphrase(&registrar, PeerRole::Agent, 100, None);
    let key = KeyRequest::new().unwrap();
    let good = request(PeerRole::Agent, &text, &key);
    let far = Timestamp(good.time.0 - 3 * 86_400_000_000_000);
    let refused = |request: &RegisterRequest| message(registrar.register(HERE, request).unwrap_err());
    assert!(refused(&RegisterRequest { time: far, ..good.clone() }).contains("clock says"));
    for name in ["a/b", "", &"x".repeat(10_000)] {
        assert!(refused(&RegisterRequest { name: name.into(), ..good.clone() }).len() < 200);
    }
    assert!(refused(&RegisterRequest { request: "zz".into(), ..good.clone() }).contains("cannot be read"));
    assert!(refused(&RegisterRequest { request: "0102".into(), ..good.clone() }).contains("certificate"));
    assert_eq!(registrar.passphrases()[0].uses_left, 100, "what was refused used nothing up");
    for _ in 0..5 {
        refused(&RegisterRequest { passphrase: "guess-guess".into(), ..good.clone() });
    }
    assert!(matches!(registrar.register(HERE, &good), Err(Refused::TooMany(_))), "also the right one waits now");
    registrar.register(IpAddr::from([10, 0, 0, 1]), &good).unwrap();
    for (lifetime_seconds, uses) in [(0, 1), (u64::MAX / 2, 1), (60, 0)] {
        let request = PassphraseRequest { role: PeerRole::Agent, lifetime_seconds, uses, replaces: None };
        assert_eq!(registrar.create_passphrase(&request).unwrap_err().kind, FailureKind::BadRequest);
    }
}

#[test]
fn passphrases_that_are_shown_at_once_are_counted_as_those_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let right = passphrase(&registrar, PeerRole::Agent, 100, None);
    let id = right.split_once('-').expect("the first part names it").0;
    let key = KeyRequest::new().unwrap();
    let wrong = request(PeerRole::Agent, &format!("{id}-wrong"), &key);
    let begun = std::sync::Barrier::new(20);
    let refused = std::thread::scope(|scope| {
        let show = || {
            begun.wait();
            matches!(registrar.register(HERE, &wrong), Err(Refused::TooMany(_)))
        };
        let shown: Vec<_> = (0..20).map(|_| scope.spawn(show)).collect();
        shown.into_iter().map(|of| of.join().unwrap()).filter(|refused| *refused).count()
    });
    assert_eq!(refused, 15, "five were looked at");
    // Right ones, as of many hosts behind one address, wait for each other and are all taken.
    let elsewhere = IpAddr::from([10, 0, 0, 1]);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                let asked = request(PeerRole::Agent, &right, &KeyRequest::new().unwrap());
                issued(registrar.register(elsewhere, &asked).unwrap())
            });
        }
    });
}

#[test]
fn a_process_server_waits_for_approval_and_asks_again_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let text = passphrase(&registrar, PeerRole::ProcessServer, 1, None);
    let (key, other) = (KeyRequest::new().unwrap(), KeyRequest::new().unwrap());
    let asked = request(PeerRole::ProcessServer, &text, &key);
    let Registered::Waiting { registration } = registrar.register(HERE, &asked).unwrap() else { panic!("not waiting") };
    assert_eq!(registrar.register(HERE, &asked).unwrap(), Registered::Waiting { registration: registration.clone() });
    let anew = KeyRequest::from_key_pem(key.key_pem()).unwrap();
    assert_ne!(anew.request(), key.request());
    let anew = request(PeerRole::ProcessServer, &text, &anew);
    assert_eq!(registrar.register(HERE, &anew).unwrap(), Registered::Waiting { registration: registration.clone() });
    let foreign = request(PeerRole::ProcessServer, &text, &other);
    assert!(message(registrar.register(HERE, &foreign).unwrap_err()).contains("used up"));
    registrar.decide("web-1", true, None).unwrap();
    let (identity, first) = issued(registrar.register(HERE, &asked).unwrap());
    // The answer was lost on its way: it asks again.
    let (again, certificate) = issued(registrar.register(HERE, &asked).unwrap());
    assert_eq!((identity, identity.role()), (again, Role::ProcessServer));
    for certificate in [first, certificate] {
        registrar.admit(identity, Some(certificate_digest(&certificate)), "web-1").unwrap();
    }
    assert!(registrar.registrations().is_empty(), "it connected: nothing waits any more");

    let text = passphrase(&registrar, PeerRole::ProcessServer, 1, None);
    let asked = request(PeerRole::ProcessServer, &text, &other);
    registrar.register(HERE, &asked).unwrap();
    registrar.decide("web-1", false, None).unwrap();
    assert!(message(registrar.register(HERE, &asked).unwrap_err()).contains("rejected by an administrator"));
    assert!(message(registrar.register(HERE, &asked).unwrap_err()).contains("used up"), "it heard it");
}

#[test]
fn a_host_that_was_installed_again_gets_its_id_with_consent_and_its_old_certificates_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let text = passphrase(&registrar, PeerRole::Agent, 1, None);
    let (old_key, new_key, renewal) =
        (KeyRequest::new().unwrap(), KeyRequest::new().unwrap(), KeyRequest::new().unwrap());
    let (identity, old) = issued(registrar.register(HERE, &request(PeerRole::Agent, &text, &old_key)).unwrap());
    let renewed = registrar.renew(identity, Some(certificate_digest(&old)), renewal.request()).unwrap();
    let admit = |certificate: &[u8]| registrar.admit(identity, Some(certificate_digest(certificate)), "web-1");
    admit(&old).unwrap();
    admit(&renewed).unwrap();

    registrar.set_standing("web-1", Some("stolen".into()), None).unwrap();
    assert!(admit(&renewed).unwrap_err().message.contains("stolen"));
    assert!(registrar.renew(identity, Some(certificate_digest(&old)), renewal.request()).is_err());
    assert_eq!(registrar.deny_list().identities, [identity.to_string()]);

    let text = passphrase(&registrar, PeerRole::Agent, 1, Some("web-1".into()));
    let (again, new) = issued(registrar.register(HERE, &request(PeerRole::Agent, &text, &new_key)).unwrap());
    assert_eq!(again, identity);
    admit(&new).unwrap();
    for certificate in [&old, &renewed] {
        assert!(admit(certificate).unwrap_err().message.contains("registered again"));
    }
    let denied = registrar.deny_list();
    assert!(denied.identities.is_empty() && denied.certificates.len() == 2, "{denied:?}");
    let nobody = PassphraseRequest {
        role: PeerRole::ProcessServer,
        lifetime_seconds: 60,
        uses: 1,
        replaces: Some("web-1".into()),
    };
    assert_eq!(registrar.create_passphrase(&nobody).unwrap_err().kind, FailureKind::NotFound, "of another role");
}

#[test]
fn an_identity_that_is_used_twice_is_refused_until_somebody_decides() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = registrar(folder.path());
    let identity = PeerIdentity::Agent(HostId::random());
    registrar.admit(identity, Some([1; 32]), "web-1").unwrap();
    let denials = registrar.denials();
    registrar.fence(identity);
    assert!(denials.has_changed().unwrap());
    assert!(registrar.admit(identity, Some([1; 32]), "web-1").unwrap_err().message.contains("two live processes"));
    registrar.set_standing("web-1", None, None).unwrap();
    registrar.admit(identity, Some([1; 32]), "web-1").unwrap();
}
