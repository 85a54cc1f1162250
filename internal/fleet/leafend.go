package fleet

import (
	"time"
)

// BrokerLeafEnd is when the certificate that is served for domain ends, or ended.
func (l *Layout) BrokerLeafEnd(domain string) (time.Time, error) {
	cert, err := l.readBrokerCert(l.BrokerCertPath(domain), domain)
	if err != nil {
		return time.Time{}, missing(err)
	}
	return cert.NotAfter, nil
}
