package peer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Ticket is the router's word that a node may read one snapshot of another, for
// a short time. A node's certificate alone reads nothing.
type Ticket struct {
	Snapshot string    `json:"snapshot"` // ID
	Reader   string    `json:"reader"`   // topology segment of the node that may read it
	Expires  time.Time `json:"expires"`
}

// ticketPurpose begins what is signed, so that nothing else that the router
// signs with its key can pass for a ticket.
const ticketPurpose = "orlop.dev/ticket/v1\x00"

// signedTicket is a ticket on its way. The certificates tell who signed it: the
// signer's first, then what leads to the authority.
type signedTicket struct {
	Ticket       json.RawMessage `json:"ticket"`
	Certificates [][]byte        `json:"certificates"` // DER
	Signature    []byte          `json:"signature"`
}

// Sign signs a ticket with the key that is shown now.
func (c *Credentials) Sign(t Ticket) ([]byte, error) {
	keys, err := c.current()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	signature, err := sign(keys.Certificate.PrivateKey, text)
	if err != nil {
		return nil, fmt.Errorf("signing a ticket: %w", err)
	}
	return json.Marshal(signedTicket{text, keys.Certificate.Certificate, signature})
}

func sign(key crypto.PrivateKey, text []byte) ([]byte, error) {
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	message := append([]byte(ticketPurpose), text...)
	if _, ok := signer.Public().(ed25519.PublicKey); ok {
		return signer.Sign(rand.Reader, message, crypto.Hash(0))
	}
	digest := sha256.Sum256(message)
	return signer.Sign(rand.Reader, digest[:], crypto.SHA256)
}

// Redeem checks a ticket: that a router of our authority has signed it, and that
// it is still good.
func (c *Credentials) Redeem(signed []byte, now time.Time) (Ticket, error) {
	var s signedTicket
	var t Ticket
	if err := json.Unmarshal(signed, &s); err != nil {
		return Ticket{}, fmt.Errorf("not a ticket: %w", err)
	}
	certificates := make([]*x509.Certificate, 0, len(s.Certificates))
	for _, der := range s.Certificates {
		certificate, err := x509.ParseCertificate(der)
		if err != nil {
			return Ticket{}, fmt.Errorf("the ticket's certificate: %w", err)
		}
		certificates = append(certificates, certificate)
	}
	if err := c.verify(certificates, x509.ExtKeyUsageClientAuth, Controller()); err != nil {
		return Ticket{}, fmt.Errorf("the ticket's signer: %w", err)
	}
	algorithm, err := algorithmOf(certificates[0])
	if err != nil {
		return Ticket{}, err
	}
	message := append([]byte(ticketPurpose), s.Ticket...)
	if err := certificates[0].CheckSignature(algorithm, message, s.Signature); err != nil {
		return Ticket{}, fmt.Errorf("the ticket's signature: %w", err)
	}
	if err := json.Unmarshal(s.Ticket, &t); err != nil {
		return Ticket{}, fmt.Errorf("not a ticket: %w", err)
	}
	if !now.Before(t.Expires) {
		return Ticket{}, fmt.Errorf("the ticket was good until %s", t.Expires.Format(time.RFC3339))
	}
	return t, nil
}

func algorithmOf(c *x509.Certificate) (x509.SignatureAlgorithm, error) {
	switch c.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return x509.ECDSAWithSHA256, nil
	case ed25519.PublicKey:
		return x509.PureEd25519, nil
	case *rsa.PublicKey:
		return x509.SHA256WithRSA, nil
	default:
		return 0, errors.New("the ticket's signer has a key of a kind that is not known here")
	}
}
